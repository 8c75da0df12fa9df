#!/usr/bin/env bash
# transformers 5.24.0: whether Trainer decays a norm's weight depends on the norm's class and name.
#
# Expected: Trainer exempts normalization layers from weight decay; exchanging GPT-2's nn.LayerNorm
# for nn.RMSNorm of torch changes the norm and nothing else.
# Seen: the exempted set is made of the class nn.LayerNorm and of patterns of parameter names
# ("layernorm", "rmsnorm", "norm"). GPT-2 calls its norms ln_1, ln_2 and ln_f, so their weights are
# decayed as soon as they are of any other class. In Llama, whose names match, they are not.
# Why it matters: a comparison of norms in one model then compares weight decay too: the new norm's
# gains are pulled to zero in every step, the LayerNorm's are not.
#
# Takes a minute or two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 \
    transformers==5.24.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY' 2>/dev/null
import transformers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer

small = dict(vocab_size=8, bos_token_id=0, eos_token_id=1)
gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=8, **small))
llama = LlamaForCausalLM(
    LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, **small)
)


def decayed_norms(model):
    decayed = Trainer.get_decay_parameter_names(Trainer.__new__(Trainer), model)
    norms = (nn.LayerNorm, nn.RMSNorm, type(llama.model.norm))
    return [f"{name}.weight" for name, module in model.named_modules()
            if isinstance(module, norms) and f"{name}.weight" in decayed]


def exchange(model):
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.LayerNorm, type(llama.model.norm))):
                setattr(parent, name, nn.RMSNorm(8))
    return model


print("transformers", transformers.__version__)
seen = {}
for name, model in (("GPT-2", gpt2), ("Llama", llama)):
    before, after = decayed_norms(model), decayed_norms(exchange(model))
    seen[name] = len(before), len(after)
    print(f"{name}: weights of norms with decay: {before} as it comes, {after} with nn.RMSNorm")
assert seen == {"GPT-2": (0, 3), "Llama": (0, 0)}, seen
PY
