"""Class and region of a kernel of a training step: from the operation it calls, or from where in the model it comes."""

from collections.abc import Callable

from bench.step_model.compiled_step import Kernel
from bench.step_model.fused_glue import ADD, EMBED, LANES, MIX, QK, SUM_DY, SUM_X0, XSA
from pgolf import ops
from pgolf.model import Model, norm
from pgolf.model.attention import attention
from pgolf.model.attention_gate import gate_logits, gate_rows
from pgolf.model.documents import packed_documents, rows_as_documents
from pgolf.model.lanes import merge_lanes, part_lanes, route_lanes
from pgolf.model.layer import attention_branch
from pgolf.model.residual import add_branch, add_mix_norm, add_norm
from pgolf.model.rotary import rotary_tables
from pgolf.model.skips import add_skip
from pgolf.ops.embedding_smear_norm import embedding_smear_norm_reference, smear
from pgolf.ops.qk_norm_rope import qk_norm_rope_reference, rotate
from pgolf.ops.residual_rms_norm import mix_streams
from pgolf.ops.xsa_gate import exclude_self, gate_heads, xsa_gate_reference

GLUE = ("glue forward", "glue backward")
CLASSES = ("matrix products", "attention", "MLP", "loss", *GLUE, "weights", "optimiser", "communication")
OTHER = "other glue"
SMALLEST_FACTOR = 32  # products with a smaller size are those of gates, which read GATE_WINDOW channels
# A kernel that reads so many results of operations which hand out a gradient of x0 sums those, whatever else it does.
MANY = 3
# Public functions of the model, and what of a kernel is theirs; the first region with one of a kernel's takes it.
FUNCTIONS: dict[str, tuple[Callable, ...]] = {
    "loss": (ops.softcapped_cross_entropy, Model.loss_of),
    EMBED: (smear, embedding_smear_norm_reference, Model.embed),
    LANES: (part_lanes, route_lanes, merge_lanes),
    MIX: (add_mix_norm, add_branch, mix_streams, add_skip),
    ADD: (add_norm,),
    XSA: (exclude_self, gate_heads, xsa_gate_reference, gate_logits),
    "weights": (Model.layer_weights, gate_rows),
    QK: (rotate, rotary_tables, qk_norm_rope_reference, attention_branch),
}
REGION_OF = {function.__name__: region for region, functions in FUNCTIONS.items() for function in functions}
_SMALL = (Model.cast, Model.rows, packed_documents, rows_as_documents, attention)
SMALL_FUNCTIONS = {function.__name__ for function in (*_SMALL, Model.forward)}
ATTENTION, MLP = attention_branch.__name__, ops.leaky_relu2_mlp.__name__
KNOWN = {*REGION_OF, *(SMALL_FUNCTIONS - {Model.forward.__name__}), MLP}
# Parts of the names of our operations that are a region each, and of functions that call them; the first one counts.
NAMES = {"lane": LANES, "smear": EMBED, "embedding": EMBED, "residual": MIX, "xsa": XSA, "qk": QK, "rope": QK}


def classify(kernel: Kernel) -> tuple[str, str]:
    """(class, region)."""
    called, found = kernel.operation, functions(kernel)
    if "attention" in called:
        return "attention", ""
    if "cross_entropy" in called:
        return "loss", ""
    in_mlp = MLP in found and ATTENTION not in found  # both where a parallel layer's gradient comes in
    if "leaky_relu2" in called:
        return "MLP", ""
    if (is_product(called) or called == "pgolf.weight_gradient") and min(map(min, kernel.shapes)) >= SMALLEST_FACTOR:
        return ("MLP" if in_mlp else "matrix products"), ""
    if called.startswith("pgolf.") and (region := _named(called)):
        return GLUE[kernel.backward], _residual(kernel) if region == MIX else region
    region = _sum(kernel) if kernel.backward and not called else ""
    mine = {REGION_OF.get(name) for name in found}
    region = region or next((region for region in FUNCTIONS if region in mine), "")
    region = region or next(filter(None, map(_named, sorted(found))), "")
    if not region:
        region = "weights" if found <= SMALL_FUNCTIONS and not called.startswith("pgolf.") else OTHER
    if region in ("loss", "weights"):
        return region, ""
    if region in (MIX, ADD):
        region = _beside_attention_or_mlp(region, found, kernel.backward)
    return GLUE[kernel.backward], region


def functions(kernel: Kernel) -> set[str]:
    """Where each operation of a kernel was written: the innermost function that a region knows, else a public one."""
    return set(filter(None, map(_function, kernel.sources)))


def is_product(called: str) -> bool:
    return called.split(".")[-2:-1] in (["mm"], ["addmm"], ["bmm"]) or called in ("mm", "addmm", "bmm")


def _function(frames: tuple[str, ...]) -> str:
    names = [name for name in _names(frames) if not name.startswith(("_", "<"))]
    if names[-1:] == [norm.__name__] and Model.embed.__name__ in names:  # computed again wherever x0 is read
        return names[-1]
    known = [name for name in names if name in KNOWN]
    return (["", *names, *known])[-1]


def _names(frames: tuple[str, ...]) -> list[str]:
    return [frame.partition(":")[2] for frame in frames]


def _named(name: str) -> str:
    return next((region for part, region in NAMES.items() if part in name.removeprefix("pgolf.")), "")


def _residual(kernel: Kernel) -> str:
    """Of residual_rms_norm*: the weights of a mix are its one argument that is not as long as the tokens."""
    called_by = (_names(frames) for frames in kernel.sources)
    if any(MIX in map(_named, names) and LANES in map(REGION_OF.get, names) for names in called_by):
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
    after_attention, after_mlp = ATTENTION in found, MLP in found
    if after_attention == after_mlp:
        return region
    return ADD if after_attention != backward else MIX
