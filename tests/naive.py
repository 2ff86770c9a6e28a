"""What the model computes, written the slow and obvious way: one document, one window, one query at a time."""

import torch
from transformers.activations import ACT2FN


def attend(query, key, value, first_place, slots, scale):
    """Query i stands at place `first_place + i` and sees the slots in front and the keys up to its own place.

    (H, n, d), (H, slots + F, d), (H, slots + F, d) -> (H, n, d)
    """
    out = torch.zeros_like(query)
    for i in range(query.shape[1]):
        end = slots + first_place + i + 1
        for head in range(query.shape[0]):
            weights = (key[head, :end] @ query[head, i] * scale).softmax(dim=0)
            out[head, i] = weights @ value[head, :end]
    return out


def attend_linearly(block, query, key, value, slots, start):
    """The definition, one query at a time. `slots` keys stand in front, which every query sees.

    start: (S, z), (H, k, d) and (H, k), that the sums begin with. -> (H, n, d), and the sums at the end
    """
    query, feature_map = query * block.query_factor, block.feature_map
    if block.far_gate is not None:
        return attend_nearby(block, query, key, value, slots, start)
    query, key = feature_map.features(query, key)
    out, (sums, norms) = torch.zeros_like(value[:, slots:]), (each.clone() for each in start)
    for j in range(key.shape[1]):
        sums += key[:, j, :, None] * value[:, j, None, :]
        norms += key[:, j]
        if j >= slots:
            i = j - slots
            for head in range(len(query)):
                denominator = (query[head, i] @ norms[head]).clamp_min(feature_map.floor)
                out[head, i] = query[head, i] @ sums[head] / denominator
    return out, (sums, norms)


def attend_nearby(block, query, key, value, slots, start):
    """As `attend_linearly`, where the nearest places are looked at by softmax instead."""
    phi_query, phi_key = block.feature_map.features(query, key)
    gate, near = block.far_gate, block.far_gate.near_tokens
    out, (sums, norms) = torch.zeros_like(query), (each.clone() for each in start)
    for j in range(key.shape[1]):
        if j >= near:
            sums += phi_key[:, j - near, :, None] * value[:, j - near, None, :]
            norms += phi_key[:, j - near]
        for head in range(len(query)):
            if j >= slots:
                scaled, first = query[head, j - slots] * query.shape[2] ** -0.5, max(0, j - near + 1)
                weights = (key[head, first : j + 1] @ scaled).exp()
                factor = (gate.weight[head] @ scaled + gate.bias[head]).exp()
                far = phi_query[head, j - slots]
                numerator = weights @ value[head, first : j + 1] + factor * far @ sums[head]
                out[head, j - slots] = numerator / (weights.sum() + factor * far @ norms[head])
    last = slice(max(0, key.shape[1] - near), key.shape[1])
    return out, (sums + phi_key[:, last].mT @ value[:, last], norms + phi_key[:, last].sum(dim=1))


def write_layer_memory(recurrence, key, value, old):
    """One window's (H, T, d) keys and values -> raw memory (2, H, slots, d); old: that before it, or None."""
    rows = []
    for head in range(key.shape[0]):
        k, v = key[head], value[head]
        slots = []
        for slot in range(recurrence.pooled_slots):
            weights = (k @ recurrence.pool_query[head, slot]).softmax(dim=0)
            fresh = torch.stack((weights @ k, weights @ v))
            gate = torch.sigmoid(fresh[0] @ recurrence.gate_weight[head, slot] + recurrence.gate_bias[head, slot])
            slots.append(fresh if old is None else gate * old[:, head, slot] + (1 - gate) * fresh)
        slots += [torch.stack((k[place], v[place])) for place in range(len(k) - recurrence.last_slots, len(k))]
        rows.append(torch.stack(slots, dim=1) if slots else key.new_zeros(2, 0, key.shape[2]))
    return torch.stack(rows, dim=1)


def read_layer_memory(recurrence, raw):
    """Raw memory (2, H, slots, d) -> keys and values (H, M, d)."""
    memory = raw if recurrence.shift is None else raw + recurrence.shift
    return (memory if recurrence.sink is None else torch.cat((recurrence.sink, memory), dim=2)).unbind(0)


def read_pooled_memory(recurrence, means):
    """(p, D) mean hidden states -> embeddings (M, D)."""
    mixed = sum(weight * mean for weight, mean in zip(recurrence.mix.softmax(0), means, strict=True))
    return recurrence.net(mixed).reshape(recurrence.slots, -1)


def split_heads(projected, heads):
    return projected.reshape(len(projected), heads, -1).transpose(0, 1)


def read(model, ids):
    """A document (n,) -> logits (n, V)."""
    config, core = model.config, model.transformer
    memory, carried, logits, slots = None, {}, [], []
    for start in range(0, len(ids), config.window):
        tokens = ids[start : start + config.window]
        positions = torch.arange(len(tokens)) + (config.position_offset if start else 0)
        hidden = core.wte.weight[tokens] + core.wpe.weight[positions]
        cache, outputs = {}, []
        for layer, block in enumerate(core.h):
            projected = block.attn.c_attn(block.ln_1(hidden)).chunk(3, dim=1)
            query, key, value = (split_heads(part, config.n_head) for part in projected)
            cache[layer] = key, value
            count = 0
            if memory is not None and layer in config.insert_layers:
                old_key, old_value = _read_memory(core, block, layer, memory)
                count = old_key.shape[1]
                key, value = torch.cat((old_key, key), dim=1), torch.cat((old_value, value), dim=1)
            if block.feature_map is None:
                heads = attend(query, key, value, 0, count, block.attn.scaling)
            else:
                carried[layer] = _decayed(block, carried.get(layer), value)
                heads, carried[layer] = attend_linearly(block, query, key, value, count, carried[layer])
            hidden = hidden + block.attn.c_proj(heads.transpose(0, 1).flatten(1))
            inner = ACT2FN[config.activation_function](block.mlp.c_fc(block.ln_2(hidden)))
            hidden = hidden + block.mlp.c_proj(inner)
            outputs.append(hidden)
        hidden = core.ln_f(hidden)
        own = hidden @ model.lm_head.weight.T
        logits += [point(core.recurrence.pointer, *each, slots) for each in zip(own, hidden, strict=True)]
        if len(tokens) == config.window:
            memory = _write_memory(core, config, cache, outputs, memory)
            slots = [*slots, *zip(hidden[:-1], tokens[1:].tolist(), strict=True)][-config.pointer_slots or len(ids) :]
    return torch.stack(logits)


def point(pointer, logits, hidden, slots):
    """One position's logits (V,) and hidden state (D,) -> those of the mixture; slots: hidden states and tokens."""
    if not slots or pointer is None:
        return logits
    query = pointer.query @ hidden
    scale = pointer.log_scale.exp()
    scores = [pointer.sentinel @ hidden + scale.max() + pointer.above.mean()]
    for earlier, _ in slots:
        key = pointer.key @ earlier
        scores.append((query * scale) @ key / query.norm() / key.norm())
    shares = torch.stack(scores).softmax(dim=0)
    probabilities = shares[0] * logits.softmax(dim=0)
    for share, (_, token) in zip(shares[1:], slots, strict=True):
        probabilities[token] += share
    return probabilities.log() + logits.logsumexp(dim=0)


def _decayed(block, state, value):
    """(S, z) that a window begins with: those at the end of the one before, decayed, or zeros."""
    if state is None or block.state_decay is None:
        features = block.feature_map.out_features
        zeros = value.new_zeros(len(value), features, value.shape[2])
        return zeros, zeros[..., 0]
    decay = block.state_decay.sigmoid()
    return decay[:, None, None] * state[0], decay[:, None] * state[1]


def _write_memory(core, config, cache, outputs, old):
    if config.pool_layers:
        return [outputs[layer].mean(dim=0) for layer in config.pool_layers]
    old = old or {}
    return {
        layer: write_layer_memory(core.recurrence.get(str(layer)), *cache[layer], old.get(layer))
        for layer in config.insert_layers
    }


def _read_memory(core, block, layer, memory):
    if isinstance(memory, dict):
        return read_layer_memory(core.recurrence.get(str(layer)), memory[layer])
    embeddings = read_pooled_memory(core.recurrence.get("pooled"), memory)
    _, key, value = block.attn.c_attn(block.ln_1(embeddings)).chunk(3, dim=1)
    heads = block.attn.num_heads
    return split_heads(key, heads), split_heads(value, heads)
