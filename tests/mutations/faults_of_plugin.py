"""Faults in the fairseq plugin."""

from fault import Fault

CRITERIONS = ("fairseq_plugin/test_criterions",)
MASKS = ("fairseq_plugin/test_padding_masks",)
STREAMS = ("fairseq_plugin/test_streams",)
TENSORIZED = ("fairseq_plugin/test_tensorized",)
FOLDING = ("fairseq_plugin/test_model_folding",)
GUARD = ("fairseq_plugin/test_config_guard",)
SUBLAYERS = ("fairseq_plugin/test_sublayers",)

PLUGIN = [
    Fault(
        "fairseq_plugin/attention.h",
        "          row[s] = dropped;",
        "          row[s] = weight;",
        "gradients of the values forget the dropout of attention",
        SUBLAYERS,
    ),
    Fault(
        "fairseq_plugin/sublayers.py",
        "tokens = slots.masked_fill(is_padding, -1)",
        "tokens = slots",
        "queries see padding where it is computed",
        SUBLAYERS,
    ),
    Fault(
        "fairseq_plugin/fast_layers.py",
        "set(available_norms()) - set(_INDIFFERENT_TO_PADDING)",
        "set()",
        "norms that take padding for tokens get other padding",
        ("fairseq_plugin/test_fast_layers",),
    ),
    Fault(
        "fairseq_plugin/patches.py",
        ".lerp(before[name], self.decay)",
        ".lerp(before[name], 1 - self.decay)",
        "the moving average of the weights forgets at once",
        ("training/test_moving_average",),
    ),
    Fault(
        "fairseq_plugin/long_lines.py",
        "np.asarray(text.sizes) > lowest.tokens",
        "np.asarray(text.sizes) > lowest.tokens + 1",
        "a line that is too long by a token is left out in silence",
        ("fairseq_plugin/test_long_lines",),
    ),
    Fault(
        "fairseq_plugin/criterions.py",
        "loss = loss + penalty",
        "loss = loss - penalty",
        "the penalty is subtracted",
        CRITERIONS,
    ),
    Fault(
        "fairseq_plugin/criterions.py",
        "if model.training and penalized:",
        "if penalized:",
        "the evaluated loss has the penalty",
        CRITERIONS,
    ),
    Fault(
        "fairseq_plugin/criterions.py",
        "total / sample_size / math.log(2)",
        "total / sample_size",
        "the logged penalty is in nats",
        CRITERIONS,
    ),
    Fault(
        "fairseq_plugin/criterions.py",
        'F.cross_entropy(scores, band_targets, reduction="sum")',
        'F.cross_entropy(scores, band_targets, ignore_index=1, reduction="sum")',
        "a word of every band costs nothing",
        TENSORIZED,
    ),
    Fault(
        "fairseq_plugin/layers.py",
        "padding_mask_for(*norms, padding_mask=encoder_padding_mask)",
        "padding_mask_for(*norms, padding_mask=None)",
        "norms of the encoder do not know the padding",
        MASKS,
    ),
    Fault(
        "fairseq_plugin/layers.py",
        'self, "final_layer_norm", norms["encoder_ffn"]',
        'self, "final_layer_norm", norms["encoder_attention"]',
        "the norm of one site stands at two",
        ("fairseq_plugin/test_model_norms",),
    ),
    Fault(
        "fairseq_plugin/streams.py",
        "lasts = np.minimum(firsts + length, ends)",
        "lasts = firsts + length",
        "segments run into the next stream",
        STREAMS,
    ),
    Fault(
        "fairseq_plugin/streams.py",
        "batches.disable_shuffling = True",
        "pass",
        "streams are shuffled",
        STREAMS,
    ),
    Fault(
        "fairseq_plugin/tensorized_attention.py",
        "visible = position <= torch.arange(",
        "visible = position <= 1 + torch.arange(",
        "the causal attention sees the token it predicts",
        TENSORIZED,
    ),
    Fault(
        "fairseq_plugin/tensorized_attention.py",
        "by_key, by_position = (q + u) * a, (q + t) * a",
        "by_key, by_position = (q + u) * a, (q + u) * a",
        "one bias serves content and position",
        TENSORIZED,
    ),
    Fault(
        "fairseq_plugin/folding.py",
        "readers += [layer.encoder_attn.k_proj, layer.encoder_attn.v_proj]",
        "readers += [layer.encoder_attn.k_proj]",
        "the values read a norm that was folded away",
        FOLDING,
    ),
    Fault(
        "fairseq_plugin/folding.py",
        "any(readings[reader] > 1 for reader in place.readers)",
        "False",
        "a shared linear layer is folded into twice",
        FOLDING,
    ),
    Fault(
        "fairseq_plugin/folding.py",
        "return folded.requires_grad_(False)",
        "return folded",
        "the folded copy can be trained",
        FOLDING,
    ),
    Fault(
        "fairseq_plugin/dropout.py",
        "ctx.scale = 1 / (1 - threshold / 2**15)",
        "ctx.scale = 1 / (1 - p) ** 2",
        "dropout scales twice",
        ("fairseq_plugin/test_fast_dropout",),
    ),
    Fault(
        "fairseq_plugin/patches.py",
        "return [*batches, indices[kept:]]",
        "return batches",
        "stock fairseq leaves out the last sentences",
        ("fairseq_plugin/test_last_batches",),
    ),
    Fault(
        "fairseq_plugin/config_guard.py",
        "if name in EVALUATED and not _is_literal(value):",
        "if False:",
        "a checkpoint's text that fairseq evaluates may be a name or a sum",
        GUARD,
    ),
    Fault(
        "fairseq_plugin/config_guard.py",
        "if name not in EVALUATED | FREE and not _is_inert(value):",
        "if False:",
        "a checkpoint's text may be code where fairseq is not known to evaluate it",
        GUARD,
    ),
    Fault(
        "fairseq_plugin/config_guard.py",
        'text.lstrip(" \\t")',
        "text",
        "code behind a blank is taken for no code, but eval skips the blank",
        GUARD,
    ),
    Fault(
        "fairseq_plugin/patches.py",
        "            check_checkpoint(state)\n",
        "            pass\n",
        "fairseq's own tools build what a checkpoint's configuration says unchecked",
        GUARD,
    ),
    Fault(
        "checkpoints/store.py",
        "        check_checkpoint(state)\n",
        "        pass\n",
        "a checkpoint's configuration is trusted",
        GUARD,
    ),
]
