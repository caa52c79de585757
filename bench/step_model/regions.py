"""Class and region of a kernel of a training step: from the operation it calls, or from where in the model it comes."""

from bench.step_model.compiled_step import Kernel
from bench.step_model.fused_glue import ADD, EMBED, LANES, MIX, QK, SUM_DY, SUM_X0, XSA

GLUE = ("glue forward", "glue backward")
CLASSES = ("matrix products", "attention", "MLP", "loss", *GLUE, "weights", "optimiser", "communication")
OTHER = "other glue"
SMALLEST_FACTOR = 32  # products with a smaller size are those of gates, which read GATE_WINDOW channels
# A kernel that reads so many results of operations which hand out a gradient of x0 sums those, whatever else it does.
MANY = 3
# Functions of pgolf/model whose work is glue of a region; the first region with one of a kernel's functions takes it.
FUNCTIONS = {
    EMBED: {"smear", "_embed"},
    LANES: {"route_to_lanes", "merge_lanes", "_two_lane_layer", "norm in _two_lane_layer"},
    MIX: {"mix_with_embedding", "add_skip", "_layers"},
    ADD: {"_layer", "_parallel_layer", "norm in _layer", "norm in _parallel_layer", "norm in _layers"},
    XSA: {"exclude_self", "gate_heads", "gate_logits"},
    "loss": {"softcapped_cross_entropy", "check_range", "loss"},
    "weights": {"_bank", "_weights", "_join", "gate_rows"},
    QK: {"rotate", "rotary_tables", "qk_norm_rope_reference", "_norm_and_rotate", "_attend"},
}
# Parts of the names of our operations that are a region each, and of functions that call them; the first one counts.
NAMES = {"lane": LANES, "smear": EMBED, "embedding": EMBED, "residual": MIX, "xsa": XSA, "qk": QK, "rope": QK}
OF_LANES = {"_two_lane_layer", "merged_norm"}  # callers of the residual operation where there are two lanes
SMALL_FUNCTIONS = {"_cast", "_rows", "forward", "packed_documents", "rows_as_documents", "attention"}


def classify(kernel: Kernel) -> tuple[str, str]:
    """(class, region)."""
    called, found = kernel.operation, functions(kernel)
    if "attention" in called:
        return "attention", ""
    if "cross_entropy" in called:
        return "loss", ""
    in_mlp = "leaky_relu2_mlp" in found and "_attend" not in found  # both where a parallel layer's gradient comes in
    if "leaky_relu2" in called:
        return "MLP", ""
    if (is_product(called) or called == "pgolf.weight_gradient") and min(map(min, kernel.shapes)) >= SMALLEST_FACTOR:
        return ("MLP" if in_mlp else "matrix products"), ""
    if called.startswith("pgolf.") and (region := _named(called)):
        return GLUE[kernel.backward], _residual(kernel) if region == MIX else region
    region = _sum(kernel) if kernel.backward and not called else ""
    region = region or next((region for region, names in FUNCTIONS.items() if names & found), "")
    region = region or next(filter(None, map(_named, sorted(found))), "")
    if not region:
        region = "weights" if found <= SMALL_FUNCTIONS and not called.startswith("pgolf.") else OTHER
    if region in ("loss", "weights"):
        return region, ""
    if region in (MIX, ADD):
        region = _beside_attention_or_mlp(region, found, kernel.backward)
    return GLUE[kernel.backward], region


def functions(kernel: Kernel) -> set[str]:
    """Where each operation of a kernel was written; of a norm also who asked for it, past the stream's class."""
    return {f"norm in {names[-2]}" if names[-1] == "norm" and len(names) > 1 else names[-1] for names in _calls(kernel)}


def is_product(called: str) -> bool:
    return called.split(".")[-2:-1] in (["mm"], ["addmm"], ["bmm"]) or called in ("mm", "addmm", "bmm")


def _calls(kernel: Kernel) -> list[list[str]]:
    passed_over = ("stream.py", "<genexpr>", "<listcomp>")
    calls = ([frame.split(":") for frame in frames] for frames in kernel.sources)
    names = ([name for file, name in call if file not in passed_over and name not in passed_over] for call in calls)
    return list(filter(None, names))


def _named(name: str) -> str:
    return next((region for part, region in NAMES.items() if part in name.removeprefix("pgolf.")), "")


def _residual(kernel: Kernel) -> str:
    """Of residual_rms_norm*: the weights of a mix are its one argument that is not as long as the tokens."""
    called_by = ({frame.partition(":")[2] for frame in frames} for frames in kernel.sources if frames)
    if any(names & OF_LANES and MIX in map(_named, names) for names in called_by):
        return LANES
    return MIX if any(shape[0] != kernel.shapes[0][0] for shape in kernel.shapes) else ADD


def _sum(kernel: Kernel) -> str:
    """The region of a generated kernel of the backward pass that sums gradients, or ""."""
    regions = [_named(made) for made in kernel.reads_of if made.startswith("pgolf.")]
    if sum(region in (MIX, LANES) for region in regions) >= MANY:
        return SUM_X0
    if not kernel.only_sums:
        return ""
    if "pgolf.weight_gradient" in kernel.reads_of:
        return "weights"
    if any("attention" in made for made in kernel.reads_of):
        return XSA  # of v
    if kernel.reads_of and all(map(is_product, kernel.reads_of)):
        return SUM_DY
    return MIX if set(regions) & {MIX, LANES} else ""


def _beside_attention_or_mlp(region: str, found: set[str], backward: bool) -> str:
    """Between attention and MLP, or between MLP and attention: a kernel also names what it takes from a product, and
    either place may compute the layer's mix again."""
    after_attention, after_mlp = "_attend" in found, "leaky_relu2_mlp" in found
    if after_attention == after_mlp:
        return region
    return ADD if after_attention != backward else MIX
