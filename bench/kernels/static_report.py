"""What every GPU kernel needs, read from its machine code on a machine with no GPU.

    python -m bench.kernels.static_report [--json [FILE]]

For each configuration that ships, compiled for Hopper: registers a thread, spills, shared memory a block, occupancy,
whether wgmma and TMA instructions are there, bytes and FLOPs, and the roofline time: the larger of bytes over
bandwidth and FLOPs over the rate, by the data sheets (H100 SXM 3.35 TB/s, H200 4.8 TB/s; both 989 TFLOP/s in dense
bfloat16 where the kernel uses wgmma, else 67 TFLOP/s in float32). Below, the bytes that whole operations move
(traffic.py). Triton kernels come from `VARIANTS` in triton_kernels/, CUDA C++ from csrc/*.cu through nvcc. A half that
cannot be read here says why.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.kernels.hopper import WARPS_PER_SM, blocks_per_sm
from pgolf.runtime.host import NVCC_PLACES, find_nvcc

ROOT = Path(__file__).resolve().parents[2]
PEAK_FLOPS = 989e12
PEAK_FLOAT32_FLOPS = 67e12
BANDWIDTH = {"h100": 3.35e12, "h200": 4.8e12}  # bytes a second
LAUNCHED_SHARED_BYTES = {"round_block": 96 * 1024}  # a block, asked for at the launch: ptxas does not tell
RECORD_VALUES = 36_000_000  # weights of a record, for the kernels that convert values
NVCC_TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class KernelReport:
    """One kernel in one configuration. None: not known for this kernel."""

    kernel: str
    language: str  # "triton" or "cuda"
    registers: int  # a thread
    spills: int  # instructions (triton) or bytes (cuda)
    shared_bytes: int  # a block
    threads: int  # a block
    occupancy: float  # resident warps / 64
    wgmma: bool
    tma: bool
    bytes_moved: int | None
    flops: int | None

    def roofline_us(self, device: str) -> float | None:
        if self.bytes_moved is None:
            return None
        rate = PEAK_FLOPS if self.wgmma else PEAK_FLOAT32_FLOPS
        return 1e6 * max(self.bytes_moved / BANDWIDTH[device], (self.flops or 0) / rate)

    def as_dict(self) -> dict:
        return {**asdict(self), **{f"{name}_us": self.roofline_us(name) for name in BANDWIDTH}}


class CannotRead(Exception):
    """A half of the report is not to be had on this machine; the message says why."""


def triton_reports() -> list[KernelReport]:
    if os.environ.get("TRITON_INTERPRET", "") not in ("", "0"):
        raise CannotRead("TRITON_INTERPRET is set, and interpreted kernels have no machine code")
    try:
        from bench.kernels import aot
    except ImportError as error:
        raise CannotRead(f"not importable: {error}") from None
    reports = []
    for variant in aot.variants():
        found = aot.compile_variant(variant)
        reports.append(
            KernelReport(
                kernel=variant.name,
                language="triton",
                registers=found.registers,
                spills=found.spill_instructions,
                shared_bytes=found.shared_bytes,
                threads=32 * variant.num_warps,
                occupancy=found.occupancy,
                wgmma=found.wgmma_instructions > 0,
                tma=found.tma_instructions > 0,
                bytes_moved=variant.bytes_moved,
                flops=variant.flops,
            )
        )
    return reports


def cuda_reports(nvcc: str | None = None) -> list[KernelReport]:
    nvcc = nvcc or find_nvcc()
    if nvcc is None:
        raise CannotRead(f"no nvcc ({NVCC_PLACES})")
    reports = []
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        log, ptx = compile_cuda(nvcc, source)
        reports += read_ptxas(log, ptx)
    return reports


def compile_cuda(nvcc: str, source: Path) -> tuple[str, str]:
    """(what ptxas says, the PTX) of a source compiled for sm_90a."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
        command += [
            "-I",
            str(ROOT / "csrc"),
            "--keep",
            "--keep-dir",
            folder,
            "-c",
            str(source),
            "-o",
            f"{folder}/out.o",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=NVCC_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise CannotRead(f"{source.name}: nvcc took more than {NVCC_TIMEOUT_SECONDS} s") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise CannotRead(f"{source.name}: nvcc failed: {lines[0] if lines else done.returncode}")
        return done.stderr + done.stdout, "".join(path.read_text() for path in Path(folder).glob("*.ptx"))


def read_ptxas(log: str, ptx: str) -> list[KernelReport]:
    """Kernels from the output of `ptxas -v`; block sizes and instructions from the PTX."""
    bodies = {}
    for entry in re.split(r"\.entry\s+", ptx)[1:]:
        bodies[re.match(r"\w+", entry).group()] = entry
    reports = []
    for part in log.split("Compiling entry function '")[1:]:
        symbol = part.split("'", 1)[0]
        body = bodies.get(symbol, "")
        threads = _first(r"\.maxntid\s+(\d+)", body) or 1024  # what the compiler must assume
        registers, shared = _first(r"Used (\d+) registers", part), _first(r"(\d+) bytes smem", part)
        name = short_name(demangle(symbol))
        shared += LAUNCHED_SHARED_BYTES.get(name, 0)
        bytes_moved, flops = conversion_work(name)
        reports.append(
            KernelReport(
                kernel=name,
                language="cuda",
                registers=registers,
                spills=_first(r"(\d+) bytes spill stores", part) + _first(r"(\d+) bytes spill loads", part),
                shared_bytes=shared,
                threads=threads,
                occupancy=blocks_per_sm(registers, threads // 32, shared) * (threads // 32) / WARPS_PER_SM,
                wgmma="wgmma" in body,
                tma="cp.async.bulk.tensor" in body,
                bytes_moved=bytes_moved,
                flops=flops,
            )
        )
    return sorted(reports, key=lambda report: report.kernel)


def conversion_work(name: str) -> tuple[int | None, int | None]:
    """Bytes and FLOPs of the packing kernels on the record's weights: a byte a value, and its bits in the stream."""
    found = re.search(r"(?:Unpack|Pack)<\(?(?:int\))?(\d)", name)
    return (RECORD_VALUES + RECORD_VALUES * int(found.group(1)) // 8, 0) if found else (None, None)


def demangle(symbol: str) -> str:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return symbol
    return subprocess.run([tool, symbol], capture_output=True, text=True, timeout=10).stdout.strip() or symbol


def short_name(name: str) -> str:
    """Without namespaces, result type, casts and parameters: convert<Pack<6>>."""
    name = re.sub(r"\(anonymous namespace\)::|pgolf::|\((?:int|bool)\)", "", name).removeprefix("void ")
    return name.split("(", 1)[0].replace("> >", ">>")


def _first(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def text_table(reports: list[KernelReport]) -> list[str]:
    header = ("kernel", "regs", "spills", "shared KB", "threads", "occupancy", "wgmma", "TMA", "MB", "GFLOP", "H100 µs",
              "H200 µs")  # fmt: skip

    def shown(value: float | None, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value / scale:.1f}"

    cells = [
        (
            report.kernel,
            str(report.registers),
            str(report.spills),
            shown(report.shared_bytes, 1024),
            str(report.threads),
            f"{100 * report.occupancy:.0f}%",
            "yes" if report.wgmma else "no",
            "yes" if report.tma else "no",
            shown(report.bytes_moved, 1e6),
            shown(report.flops, 1e9),
            shown(report.roofline_us("h100")),
            shown(report.roofline_us("h200")),
        )
        for report in reports
    ]
    widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in (header, *cells)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Registers, spills, shared memory and roofline of every GPU kernel.")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON instead of the table, or beside it")
    options = parser.parse_args(arguments)
    answer: dict[str, dict] = {}
    for language, read in (("triton", triton_reports), ("cuda", cuda_reports)):
        try:
            answer[language] = {"reports": read(), "missing": ""}
        except CannotRead as reason:
            answer[language] = {"reports": [], "missing": str(reason)}
    if options.json:
        plain = {
            language: {"missing": half["missing"], "kernels": [report.as_dict() for report in half["reports"]]}
            for language, half in answer.items()
        }
        if options.json == "-":
            print(json.dumps(plain, indent=1))
            return 0
        Path(options.json).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    for language, title in (("triton", "Triton kernels, sm_90"), ("cuda", "CUDA C++ kernels, sm_90a")):
        half = answer[language]
        print(f"{title}: {'not read: ' + half['missing'] if half['missing'] else len(half['reports'])}")
        if half["reports"]:
            print("\n".join(text_table(half["reports"])))
        print()
    if not answer["triton"]["missing"]:
        from bench.kernels import traffic

        print("Whole operations at the record's shape")
        print("\n".join(traffic.text_table()), end="\n\n")
    print(
        f"Roofline: max(bytes / bandwidth, FLOPs / {PEAK_FLOPS / 1e12:.0f} TFLOP/s with wgmma, "
        f"{PEAK_FLOAT32_FLOPS / 1e12:.0f} without), data-sheet figures. "
        f"Conversions of csrc/ are priced at {RECORD_VALUES:,} values."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
