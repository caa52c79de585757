"""From trained weights to what the artifact stores.

byte_budget  a step for every tensor, so that the file is as large as wanted
low_rank     low-rank corrections
quantize     calibration, quantization, and a model from an artifact
quantizers   what QUANTIZER chooses from
size         what a model costs in bytes
"""
