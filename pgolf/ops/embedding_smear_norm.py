"""The model's input: a row of the embedding table for each token, SmearGate, RMSNorm.

Only the inputs are kept for the backward pass, and of them only the tokens grow with the batch.
Cost for X bytes of results: X and the table forward. The backward pass reads the table and the results' gradient and
writes the gradient of each token's row, 2 X, which are then added up by row of the table, X and the table. Adding up
in the kernel would save 2 X, but with atomics, so that no two runs have the same bits. For that reason the sum is an
operation of its own: of torch's embedding_dense_backward alone, which sorts the tokens and then adds in one order,
torch.compile makes float32 atomics on a GPU. So it does in a compiled model whose embedding is not fused.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import backends, checks
from pgolf.ops.definition import in_full, widened
from pgolf.ops.residual_rms_norm import epsilon, norm, norm_gradient

backends.register("embedding_smear_norm", triton=("cuda",))


def embedding_smear_norm(tokens: Tensor, table: Tensor, weight: Tensor, strength: Tensor, starts: Tensor) -> Tensor:
    """Look up embeddings, let each take in a gated part of the one before it, and normalise.

        e_t = table[token_t]
        s_t = e_t + λ sigmoid(W · e_t[:w]) e_{t-1},   s_t = e_t where a document or a row of the batch starts
        y_t = s_t / sqrt(mean(s_t²) + eps)            over D; eps is that of float32, for float64 its own

    Computed in float32 (float64 for float64) and rounded once. Differentiable in table, weight and strength, once.

    Args:
        tokens: (rows, length) int64 or int32, in 0..V-1.
        table: (V, D) embeddings, floating.
        weight: (1, w), the dtype of table or float32: W of the gate, which reads the first w <= D channels.
        strength: (1,), dtype as for weight: λ, the gate's largest value.
        starts: (rows, length) or (1, length) bool, whether a document starts at a token. The first of a row always
            does.
    Returns:
        (rows, length, D), the dtype of table.
    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a shape or device that does not fit; on the CPU a token outside 0..V-1 (on a GPU the device
            asserts).
        BackendUnavailable: a backend is forced that has no kernel here.
    Example:
        >>> import torch
        >>> from pgolf import ops
        >>> tokens = torch.randint(100, (2, 8))
        >>> starts = torch.zeros(1, 8, dtype=torch.bool)
        >>> ops.embedding_smear_norm(tokens, torch.randn(100, 32), torch.randn(1, 12), torch.ones(1), starts).shape
        torch.Size([2, 8, 32])

    Source: SmearGate, PR #1667 of the challenge; its mask at document starts, PR #1855.
    """
    _check(tokens, table, weight, strength, starts)
    exact = table.dtype == torch.float64
    backend = "reference" if exact else backends.choose("embedding_smear_norm", table.device.type)
    return _forward(tokens, table, weight, strength, starts, backend)


def embedding_smear_norm_reference(
    tokens: Tensor, table: Tensor, weight: Tensor, strength: Tensor, starts: Tensor
) -> Tensor:
    """The definition in plain PyTorch; arguments as for `embedding_smear_norm`."""
    e = F.embedding(tokens, table)
    return norm(smear(e, weight, strength, starts).to(e.dtype))


def smear(e: Tensor, weight: Tensor, strength: Tensor, starts: Tensor) -> Tensor:
    """SmearGate alone, s of `embedding_smear_norm` for the embeddings e (rows, length, D).

    Without the mask the last token of one document would leak into the first of the next (0.0025 bpb, PR #1797).
    """
    gate = strength * torch.sigmoid(F.linear(e[..., : weight.shape[-1]], weight.to(e.dtype)))  # (rows, length, 1)
    before = F.pad(e[:, :-1], (0, 0, 1, 0))
    return e + (gate * ~starts.unsqueeze(-1)) * before


@torch.library.custom_op("pgolf::embedding_smear_norm", mutates_args=())
def _forward(
    tokens: Tensor,  # (rows, length)
    table: Tensor,  # (V, D)
    weight: Tensor,  # (1, w)
    strength: Tensor,  # (1,)
    starts: Tensor,  # (rows or 1, length)
    backend: str,
) -> Tensor:
    _check(tokens, table, weight, strength, starts)  # again: this operation can be called without the public function
    _check_range(tokens, table.shape[0])
    if _uses_kernel(tokens, table, backend):
        from pgolf.triton_kernels.embedding_smear_norm import launch  # here, because triton is not on every machine

        out = launch(*_flat(tokens, table, weight, strength, starts), tokens.shape[1], epsilon(table.dtype))
        return out.view(*tokens.shape, -1)
    return in_full(embedding_smear_norm_reference, tokens, table, weight, strength, starts)


@_forward.register_fake
def _(tokens, table, weight, strength, starts, backend):
    return table.new_empty((*tokens.shape, table.shape[1]))


@torch.library.custom_op("pgolf::embedding_smear_norm_backward", mutates_args=())
def _gradients(
    tokens: Tensor, table: Tensor, weight: Tensor, strength: Tensor, starts: Tensor, grad: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:  # of the gathered rows (rows, length, D), dweight, dstrength
    if _uses_kernel(tokens, table, backend):
        from pgolf.triton_kernels.embedding_smear_norm import launch_backward

        inputs = _flat(tokens, table, weight, strength, starts)
        flat_grad = grad.reshape(-1, table.shape[1]).contiguous()
        drows, sums = launch_backward(*inputs, flat_grad, tokens.shape[1], epsilon(table.dtype))
        dweight, dstrength = sums.split([weight.shape[1], 1])
        return drows.view(grad.shape), dweight.to(weight.dtype).view(1, -1), dstrength.to(strength.dtype, copy=True)
    e = widened(F.embedding(tokens, table))
    d = norm_gradient(smear(e, weight, strength, starts), widened(grad), table.dtype)
    before = F.pad(e, (0, 0, 1, 0))[:, :-1].masked_fill_(starts.unsqueeze(-1), 0)
    sigmoid = torch.sigmoid(F.linear(e[..., : weight.shape[1]], weight.to(e.dtype)))
    dgate = (d * before).sum(-1, keepdim=True)
    dlogit = dgate * strength * sigmoid * (1 - sigmoid)
    window = weight.shape[1]
    drows = d.clone()
    drows[..., :window] += dlogit * weight
    handed_back = (strength * sigmoid * d).masked_fill_(starts.unsqueeze(-1), 0)
    drows[:, :-1] += handed_back[:, 1:]
    dweight = (dlogit * e[..., :window]).sum((0, 1)).unsqueeze(0).to(weight.dtype)
    return drows.to(table.dtype), dweight, (dgate * sigmoid).sum().view(1).to(strength.dtype)


@_gradients.register_fake
def _(tokens, table, weight, strength, starts, grad, backend):
    return grad.new_empty(grad.shape), weight.new_empty(weight.shape), strength.new_empty(strength.shape)


@torch.library.custom_op("pgolf::embedding_gradient", mutates_args=())
def _summed_by_token(drows: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:  # (rows, length, D), (rows, length)
    return torch.ops.aten.embedding_dense_backward(drows, tokens, vocabulary, -1, False)


@_summed_by_token.register_fake
def _(drows, tokens, vocabulary):
    return drows.new_empty((vocabulary, drows.shape[-1]))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    tokens, table, weight, strength, starts = ctx.saved_tensors
    drows, dweight, dstrength = _gradients(tokens, table, weight, strength, starts, grad, ctx.backend)
    dtable = None
    if ctx.needs_input_grad[1]:
        dtable = _summed_by_token(drows, tokens, table.shape[0])
    return None, dtable, dweight, dstrength, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _flat(tokens: Tensor, table: Tensor, weight: Tensor, strength: Tensor, starts: Tensor) -> list[Tensor]:
    """As the kernels take them: tokens one after the other, everything without gaps."""
    tokens, weight, strength, starts = (value.contiguous().view(-1) for value in (tokens, weight, strength, starts))
    return [tokens, table.contiguous(), weight, strength, starts]


def _uses_kernel(tokens: Tensor, table: Tensor, backend: str) -> bool:
    if backend != "triton" or 0 in (tokens.numel(), table.numel()):
        return False
    from pgolf.triton_kernels.embedding_smear_norm import accepts

    return accepts(table.dtype, table.shape[1])


def _check_range(tokens: Tensor, vocabulary: int) -> None:
    """On the CPU; a host check would synchronise a device, where the kernels assert."""
    if tokens.device.type == "cpu" and tokens.numel():
        for value in torch.aminmax(tokens):
            if not 0 <= value < vocabulary:
                raise ValueError(f"tokens: value {value} is not accepted; accepted are 0..{vocabulary - 1}")


def _check(tokens: Tensor, table: Tensor, weight: Tensor, strength: Tensor, starts: Tensor) -> None:
    checks.tensor("tokens", tokens, (torch.int64, torch.int32))
    if tokens.ndim != 2:
        raise ValueError(f"tokens: shape {tuple(tokens.shape)} is not accepted; expected (rows, length)")
    checks.tensor("table", table, checks.FLOATS)
    if table.ndim != 2:
        raise ValueError(f"table: shape {tuple(table.shape)} is not accepted; expected (V, D)")
    for name, value in (("weight", weight), ("strength", strength)):
        checks.tensor(name, value, (table.dtype, torch.float32))
    if weight.ndim != 2 or weight.shape[0] != 1 or weight.shape[1] > table.shape[1]:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)} is not accepted; expected (1, w) with w <= {table.shape[1]}"
        )
    checks.shape("strength", strength, (1,), "one for all tokens")
    checks.tensor("starts", starts, (torch.bool,))
    if starts.shape not in (tokens.shape, (1, tokens.shape[1])):
        raise ValueError(
            f"starts: shape {tuple(starts.shape)} is not accepted; expected {tuple(tokens.shape)} or "
            f"(1, {tokens.shape[1]})"
        )
    checks.same_device("table", table, tokens=tokens, weight=weight, strength=strength, starts=starts)
