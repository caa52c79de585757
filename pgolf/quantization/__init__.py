"""From trained weights to what the artifact stores.

byte_budget  a step for every tensor, so that the file is as large as wanted
calibration  what is learned from text before rounding
config       how a run quantizes: quantizer, bits, clips
low_rank     low-rank corrections
quantize     every parameter in its stored form, within a budget
quantizers   what QUANTIZER chooses from
size         what a model costs in bytes
"""
