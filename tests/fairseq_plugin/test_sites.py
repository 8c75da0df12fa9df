"""resolve_sites: the norm at each site, and invalid choices."""

import json
import subprocess
import sys
from typing import Any

import pytest

from normexp.norms import norm_options
from normexp.sites import SITES, resolve_sites

ENCODER = ["encoder_attention", "encoder_ffn", "encoder_final"]
DECODER = ["decoder_attention", "decoder_cross", "decoder_ffn", "decoder_final"]
LANGUAGE_MODEL = ["decoder_attention", "decoder_ffn", "decoder_final"]
PRE_NORM = {"normalize_before": True, "embed_dim": 64}


def _translation(**values: Any) -> dict[str, Any]:
    return {"encoder": dict(PRE_NORM), "decoder": dict(PRE_NORM), **values}


def _language_model(**values: Any) -> dict[str, Any]:
    return {"decoder_normalize_before": True, "decoder_embed_dim": 64, **values}


def _names(resolved: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {site: choice["name"] for site, choice in resolved.items()}


def test_norm_stands_at_encoder_sites_of_translation_and_layer_in_the_decoder() -> None:
    names = _names(resolve_sites("translation", _translation(norm="batch")))
    assert names == {**dict.fromkeys(ENCODER, "batch"), **dict.fromkeys(DECODER, "layer")}
    assert list(names) == ENCODER + DECODER


def test_norm_stands_at_every_site_of_a_language_model() -> None:
    names = _names(resolve_sites("language_model", _language_model(norm="power")))
    assert names == dict.fromkeys(LANGUAGE_MODEL, "power")


def test_layer_is_the_default() -> None:
    assert set(_names(resolve_sites("translation", _translation())).values()) == {"layer"}


def test_options_reach_the_sites_of_norm_only_and_defaults_are_written_out() -> None:
    model = _translation(
        norm="power",
        norm_options='{"alpha_fwd": 0.5}',
        norm_sites='{"encoder_ffn": "power", "decoder_ffn": {"name": "batch", "momentum": 0.25}}',
    )
    resolved = resolve_sites("translation", model)
    defaults = norm_options("power")
    assert resolved["encoder_attention"] == {"name": "power", **defaults, "alpha_fwd": 0.5}
    assert resolved["encoder_final"] == resolved["encoder_attention"]
    assert resolved["encoder_ffn"] == {"name": "power", **defaults}
    assert resolved["decoder_ffn"]["name"] == "batch"
    assert resolved["decoder_ffn"]["momentum"] == 0.25
    assert resolved["decoder_cross"] == {"name": "layer", **norm_options("layer")}


def test_the_result_can_be_written_as_json() -> None:
    resolved = resolve_sites("translation", _translation(norm="power_released"))
    assert json.loads(json.dumps(resolved)) == resolved


@pytest.mark.parametrize(
    ("kind", "model", "absent"),
    [
        ("translation", _translation(encoder={"embed_dim": 64}), {"encoder_final"}),
        ("translation", _translation(decoder={"embed_dim": 64}), {"decoder_final"}),
        ("translation", _translation(no_decoder_final_norm=True), {"decoder_final"}),
        ("translation", _translation(no_cross_attention=True), {"decoder_cross"}),
        ("language_model", _language_model(decoder_normalize_before=False), {"decoder_final"}),
        ("language_model", _language_model(no_decoder_final_norm=True), {"decoder_final"}),
    ],
)
def test_sites_that_the_model_lacks_are_left_out_and_cannot_be_overridden(
    kind: str, model: dict[str, Any], absent: set[str]
) -> None:
    resolved = resolve_sites(kind, {**model, "norm": "batch"})
    assert set(SITES[kind]) - set(resolved) == absent
    override = json.dumps({absent.pop(): "batch"})
    with pytest.raises(ValueError, match=r"this model has no .*_(final|cross)"):
        resolve_sites(kind, {**model, "norm_sites": override})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm": "powr"}, "unknown normalization 'powr'; known: .*power"),
        ({"norm": "batch", "norm_options": '{"momentun": 1}'}, "no option 'momentun'.*momentum"),
        ({"norm": "batch", "norm_options": '{"momentum": 7}'}, "momentum must lie in"),
        ({"norm": "batch", "norm_options": '{"momentum": "x"}'}, "momentum must lie in"),
        ({"norm": "batch", "norm_options": '{"num_features": 3}'}, "norm_options.*num_features"),
        ({"norm_options": '{"name": "batch"}'}, "the name is the value of norm"),
        ({"norm_options": "{alpha: 1}"}, "norm_options is not JSON: '{alpha: 1}'"),
        ({"norm_options": "[1]"}, "norm_options must be a JSON object"),
        ({"norm_sites": "{'decoder_ffn': 'batch'}"}, "norm_sites is not JSON"),
        ({"norm_sites": '{"decoder": "batch"}'}, "unknown site 'decoder'; .*decoder_cross"),
        ({"norm_sites": '{"decoder_ffn": "bach"}'}, "norm_sites, decoder_ffn: unknown norm.*batch"),
        ({"norm_sites": '{"decoder_ffn": {"eps": 1}}'}, "norm_sites, decoder_ffn: expected NAME"),
        ({"norm_sites": '{"decoder_ffn": 3}'}, "norm_sites, decoder_ffn: expected NAME"),
        (
            {"norm_sites": '{"decoder_ffn": {"name": "power_released", "num_groups": 7}}'},
            "num_groups=7 does not divide 64 channels",
        ),
    ],
)
def test_bad_values_are_refused_with_what_is_known(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_sites("translation", _translation(**values))


def test_unknown_norm_is_refused_although_every_site_is_overridden() -> None:
    sites = json.dumps(dict.fromkeys(LANGUAGE_MODEL, "layer"))
    with pytest.raises(ValueError, match="unknown normalization 'powr'"):
        resolve_sites("language_model", _language_model(norm="powr", norm_sites=sites))


@pytest.mark.parametrize("site", ["encoder_ffn", "decoder_cross"])
def test_language_model_has_neither_encoder_nor_cross_attention(site: str) -> None:
    with pytest.raises(ValueError, match=f"unknown site '{site}'.*decoder_attention"):
        resolve_sites("language_model", _language_model(norm_sites=json.dumps({site: "batch"})))


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown kind.*translation, language_model"):
        resolve_sites("summarization", {})


def test_works_without_fairseq() -> None:
    code = (
        "import sys; sys.modules['fairseq'] = None\n"
        "from normexp.sites import resolve_sites\n"
        "print(resolve_sites('language_model', {'norm': 'batch'})['decoder_ffn']['name'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "batch\n"


@pytest.mark.parametrize("site", ["decoder_attention", "decoder_ffn", "decoder_final"])
def test_norms_that_see_later_positions_are_refused_in_decoders(site: str) -> None:
    for kind, model in (("translation", _translation), ("language_model", _language_model)):
        with pytest.raises(ValueError, match=f"'instance' cannot stand at {site}"):
            resolve_sites(kind, model(norm_sites=json.dumps({site: "instance"})))
    names = _names(resolve_sites("translation", _translation(norm="instance")))
    assert names["encoder_final"] == "instance" and names["decoder_final"] == "layer"
