"""The architecture once more, from its formulas: one document, token by token and head by head, in float64."""

import math

import torch


def norm(x, scale=1.0):
    return scale * x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def sequence(config, looping):
    """Layers in order, by unrolling; (layer, what to do with its output or before it)."""
    order = []
    for layer in range(config.num_layers):
        order.append(layer)
        if looping and layer == config.loop_end:
            order += list(range(config.loop_start, config.loop_end + 1)) * config.num_loops
    return order


def turn(x, position, config, length):
    """Rotary embedding of one head's vector at a position."""
    d, base = config.rope_dims or config.head_dim, config.rope_base
    s = max(1.0, length / config.rope_train_seq_len)
    if config.rope_scaling == "ntk":
        base *= s ** (d / (d - 2))
    x = x.clone()
    for i in range(d // 2):
        f = base ** (-2 * i / d)
        if config.rope_scaling == "yarn":
            turns = config.rope_train_seq_len * f / (2 * math.pi)
            kept = min(1.0, max(0.0, (turns - 1) / 31))
            f = kept * f + (1 - kept) * f / s
        c, n = math.cos(position * f), math.sin(position * f)
        a, b = x[i].clone(), x[i + d // 2].clone()
        x[i], x[i + d // 2] = a * c + b * n, b * c - a * n
    return x


def attend(model, layer, h, tokens):
    """Before the output projection, (length, dim)."""
    config, length, d = model.config, len(h), model.config.head_dim
    layers, groups = config.num_layers, config.num_heads // config.num_kv_heads
    stretch = max(1.0, length / config.rope_train_seq_len)
    sharpen = (0.1 * math.log(stretch) + 1) ** 2 if config.rope_scaling == "yarn" else 1.0
    query = h @ model.qo_bank[layer].T
    values = h @ model.kv_bank[layers + layer].T
    if layer in config.value_embedding_layers:
        scale = model.value_scale * model.value_layer_scales[config.value_embedding_layers.index(layer)]
        values = values + scale * (model.value_embedding[tokens] @ model.value_projection.T)
    heads = []
    for head in range(config.num_heads):
        mine, shared = slice(head * d, (head + 1) * d), slice(head // groups * d, (head // groups + 1) * d)
        q, k = norm(query[:, mine]), norm(h @ model.kv_bank[layer][shared].T)
        q = torch.stack([turn(x, t, config, length) for t, x in enumerate(q)]) * model.q_gain[layer, head] * sharpen
        k = torch.stack([turn(x, t, config, length) for t, x in enumerate(k)])
        y = torch.stack([(k[: t + 1] @ q[t] / d**0.5).softmax(0) @ values[: t + 1, shared] for t in range(length)])
        if layer >= layers - config.xsa_last_n:
            v = values[:, shared]
            y = y - (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True) * v
        if config.attn_out_gate_enabled:
            source = query if config.attn_out_gate_src == "q" else h
            y = y * 2 * torch.sigmoid(source[:, : config.gate_window] @ model.attn_gate[layer, head])[:, None]
        if config.sparse_attn_gate_enabled:
            z = config.sparse_attn_gate_scale * (h[:, : config.gate_window] @ model.attn_gate[layer, head])
            y = y * torch.sigmoid(z)[:, None]
        heads.append(y)
    return torch.cat(heads, -1)


def branches(model, layer, h, g, tokens):
    """Attention of h and MLP of g, each with its scale; g may be a function of attention's branch."""
    config = model.config
    out = model.qo_bank[config.num_layers + layer]
    attention = model.attn_scale[layer] * (attend(model, layer, h, tokens) @ out.T)
    z = (g(attention) if callable(g) else g) @ model.up_bank[layer].T
    hidden = torch.where(z > 0, z, config.mlp_slope * z) ** 2
    return attention, model.mlp_scale[layer] * (hidden @ model.down_bank[layer].T)


def embed(model, tokens):
    config = model.config
    x = model.embedding[tokens]
    if config.bigram_vocab_size:
        last = config.bigram_vocab_size - 1
        pairs = zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
        buckets = [last] + [((36_313 * new) ^ (27_191 * old)) % last for old, new in pairs]
        x = x + model.bigram_scale * (model.bigram_embedding[buckets] @ model.bigram_projection.T)
    if config.smear_gate_enabled:
        rows = [x[0]]
        for t in range(1, len(x)):
            gate = model.smear_lambda * torch.sigmoid(model.smear_gate[0] @ x[t, : config.gate_window])
            rows.append(x[t] if config.smear_gate_bos_fix and tokens[t] == config.bos_id else x[t] + gate * x[t - 1])
        x = torch.stack(rows)
    return norm(x)


def plain_logits(model, tokens):
    """(length,) -> (length, vocab_size), before the soft-cap."""
    config = model.config
    order = sequence(config, model.looping)
    half = len(order) // 2
    x = x0 = embed(model, tokens)
    lanes, stored = None, []
    for i, layer in enumerate(order):
        scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1.0
        if lanes is None and i >= half and config.parallel_start_layer and layer >= config.parallel_start_layer:
            lanes = x
        if config.unet_skips and half <= i < 2 * half:
            skip = model.skip_weights[i - half] * stored.pop()
            if config.skip_gates_enabled:
                g = torch.sigmoid(model.skip_gates[i - half])
                x = g * x + (1 - g) * skip
            else:
                x = x + skip
        mixed = model.resid_mix[layer, 0] * x + model.resid_mix[layer, 1] * x0
        if lanes is not None:
            a, m = branches(model, layer, norm(mixed, scale), norm(lanes, scale), tokens)
            keep, post = model.parallel_resid_lambdas[layer], model.parallel_post_lambdas[layer]
            x, lanes = (
                keep[0] * x + post[0, 0] * a + post[1, 0] * m,
                keep[1] * lanes + post[0, 1] * a + post[1, 1] * m,
            )
        elif 0 <= config.parallel_residual_start <= layer:
            a, m = branches(model, layer, norm(mixed, scale), norm(mixed, scale), tokens)
            x = mixed + a + m
        else:
            a, m = branches(model, layer, norm(mixed, scale), lambda a, x=mixed, s=scale: norm(x + a, s), tokens)
            x = mixed + a + m
        if i < half:
            stored.append(x)
    if lanes is not None:
        x = {"mean": (x + lanes) / 2, "attn": x, "mlp": lanes}[config.parallel_final_lane]
    return norm(x) @ model.embedding.T
