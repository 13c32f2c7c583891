"""Checkpoints that load and are not what is meant: each is refused by name before its weights are read."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Phi3Config,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
)
from transformers.models.auto.modeling_auto import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
)

from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import IamaWarning, ModelError, RewardError
from iama.models.checkpoint import check_token_ids, read_outline
from iama.models.fingerprint import is_other_revision, weights_revision
from iama.models.loading import check_model_dir, load_model, loading, pick_device
from iama.rewards.load import check_reward, load_reward
from inference.engine.decode import decode
from inference.engine.policy import load_policy, read_policy_files
from tests.conftest import make_tokenizer, tiny_config

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
USABLE = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models by name, all with the tiny tokenizer."""
    root, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    torch.manual_seed(0)
    size = {**SIZES, "vocab_size": len(tokenizer)}
    encoder_decoder = {"d_model": 16, "vocab_size": len(tokenizer)}
    bart = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")}
    roberta = RobertaConfig(**size, max_position_embeddings=USABLE + 4, pad_token_id=3, num_labels=1)
    made = {
        "prm": LlamaForTokenClassification(tiny_config(tokenizer, num_labels=2)),
        "qa": AutoModelForQuestionAnswering.from_config(BertConfig(**size)),
        "mlm": AutoModelForMaskedLM.from_config(BertConfig(**size)),
        "t5": AutoModelForSeq2SeqLM.from_config(
            T5Config(**encoder_decoder, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        ),
        "bart": AutoModelForSeq2SeqLM.from_config(BartConfig(**encoder_decoder, **bart)),
        "roberta": RobertaForSequenceClassification(roberta),
        "lm": AutoModelForCausalLM.from_config(tiny_config(tokenizer)),
        "rm": LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def changed(models, tmp_path):
    """A function that copies a model and changes keys of its config.json."""

    def change(name, **keys):
        folder = shutil.copytree(models / name, tmp_path / "changed", dirs_exist_ok=True)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        return folder

    return change


def check(use, folder):
    """What every command does before it loads a policy or a reward, or any other model."""
    if use == "policy":
        read_policy_files("p", PolicySpec(path=str(folder)))
    elif use == "reward":
        check_reward("r", RewardSpec(model=str(folder)))
    else:
        check_model_dir(str(folder), use)


OWN_CODE = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "architectures": ["Own"]}
CODE = "brings code of its own, which only a policy with trust_remote_code: true"
NO_POLICY = "; a policy must be a causal language model"
NO_REWARD = "; a reward model must be a sequence classifier"


@pytest.mark.parametrize(
    ("name", "use", "keys", "told"),
    [
        ("prm", "reward", {}, f"is a LlamaForTokenClassification, which labels every token, .*{NO_REWARD}"),
        ("prm", "policy", {}, f"is a LlamaForTokenClassification, .*{NO_POLICY}"),  # its head is tied: nothing lacks
        ("qa", "reward", {}, f"is a BertForQuestionAnswering, which marks an answer in a text{NO_REWARD}"),
        ("lm", "reward", {}, f"is a LlamaForCausalLM, which writes texts{NO_REWARD}"),
        ("rm", "policy", {}, f"is a LlamaForSequenceClassification, which scores texts{NO_POLICY}"),
        ("mlm", "policy", {}, f"is a BertForMaskedLM, which fills gaps in a text{NO_POLICY}"),
        ("t5", "policy", {}, f"is a T5ForConditionalGeneration, which has an encoder of its own .*{NO_POLICY}"),
        ("bart", "policy", {}, f"is a BartForConditionalGeneration, which has an encoder of its own .*{NO_POLICY}"),
        (
            "lm",
            "policy",
            {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {}},
            rf"is a LlavaForConditionalGeneration, which reads more than texts \(vision\){NO_POLICY}",
        ),
        ("rm", "reward", {"model_type": "own", **OWN_CODE}, CODE),
        ("rm", "reward", OWN_CODE, CODE),  # transformers would take its own Llama
        ("lm", "policy", {"model_type": "own", **OWN_CODE}, rf"{CODE} \(--trust-remote-code\)"),
        ("lm", "policy", {"model_type": "nonsense", "architectures": ["X"]}, "cannot load .*`nonsense`"),
        ("lm", "policy", {"num_hidden_layers": 1}, r"hold 'model\.layers\.1\..*, without which LlamaForCausalLM would"),
        ("lm", "policy", {"tie_word_embeddings": False}, r"lack 1 tensors, e\.g\. 'lm_head\.weight'"),
        ("lm", "policy", {"hidden_size": 64}, "cannot load"),
    ],
)
def test_what_is_no_policy_or_no_reward_is_refused_by_name(changed, monkeypatch, name, use, keys, told):
    """Also where all tensors are there; nothing is asked on the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    folder = changed(name, **keys)
    with pytest.raises(ModelError, match=told) as caught:
        check(use, folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{use} ")


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("gptq", r"optimum"),
        ("awq", "gptqmodel"),
        ("bitsandbytes", "requires bitsandbytes"),
        pytest.param(
            "compressed-tensors",
            "pip install compressed-tensors",
            marks=pytest.mark.skipif(find_spec("compressed_tensors") is not None, reason="it is there: vLLM brings it"),
        ),
        ("torchao", "torchao"),
        ("hqq", "HQQ"),
        ("quanto", "optimum-quanto"),
        ("odd", "this transformers does not know it"),
    ],
)
def test_a_quantized_checkpoint_names_the_package_that_it_needs(changed, method, told):
    settings = {"quant_method": method, "bits": 4, "group_size": 128, "weights": "int8", "load_in_4bit": False}
    settings |= {"load_in_4bit": True} if method == "bitsandbytes" else {}
    settings |= {"quant_type": {"default": {}}} if method == "torchao" else {}
    folder = changed("lm", quantization_config=settings)
    with pytest.raises(
        ModelError, match=rf"^policy 'p': '.*' is quantized \({method}\) and cannot be read here .*{told}"
    ):
        read_policy_files("p", PolicySpec(path=str(folder)))


def test_tensors_that_a_layer_would_be_read_without(models, tmp_path):
    """A bias of the head, which transformers drops; whole layers beside the model are told of."""
    folder = shutil.copytree(models / "rm", tmp_path / "rm")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"score.bias": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"hold 'score\.bias', without which LlamaForSequenceClassification would read"
    ):
        check_reward("r", RewardSpec(model=str(folder)))
    with pytest.raises(ModelError, match=r"hold 'score\.bias'"):
        load_model(AutoModelForSequenceClassification, str(folder), "reward 'r'")
    save_file(weights | {"v_head.weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(IamaWarning, match=r"1 tensors of .* are not used, e\.g\. 'v_head\.weight'"):
        check_reward("r", RewardSpec(model=str(folder)))


def test_usable_positions_of_roberta_and_its_kin(models):
    """A text of 32 tokens is scored, one of 33 refused by our own line."""
    outline = read_outline(str(models / "roberta"), "r", "reward")
    assert (outline.config.max_position_embeddings, outline.context_length) == (USABLE + 4, USABLE)
    reward = load_reward("r", RewardSpec(model=str(models / "roberta")))
    assert len(reward.score([" ".join(["a"] * (USABLE - 1))], [""], {})[0]) == 1  # and the end token
    with pytest.raises(RewardError, match=rf"has {USABLE + 1} tokens, but '.*' reads at most {USABLE}"):
        reward.score([" ".join(["a"] * USABLE)], [""], {})


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("token", r"1 token ids lie outside the table of .*, which has 99 rows, e\.g\. 99 \('<extra>'\)"),
        ("config", r"e\.g\. 500 \(eos_token_id in config\.json\)"),
        ("generation_config", r"e\.g\. 500 \(eos_token_id in generation_config\.json\)"),
    ],
)
def test_every_token_has_a_row_in_the_table(models, changed, where, told):
    folder = changed("lm", **({"eos_token_id": [3, 500]} if where == "config" else {}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if where == "generation_config":
        (folder / "generation_config.json").write_text('{"eos_token_id": [3, 500]}')
    if where == "token":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    with pytest.raises(ModelError, match=told):
        check_token_ids(read_outline(str(folder), "policy", "policy"), tokenizer, str(folder), "policy")
    check_token_ids(
        read_outline(str(models / "lm"), "policy", "policy"), AutoTokenizer.from_pretrained(models / "lm"), "", "policy"
    )


@pytest.mark.parametrize("use", ["policy", "reward"])
@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"vocab_size": "100"}, r"cannot load '.*' \(its config\.json: .*'vocab_size'.* expected int, got str"),
        ({"max_position_embeddings": None}, r"its config\.json: .*'max_position_embeddings'"),
        ({"max_position_embeddings": 64.0}, r"its config\.json: .*'max_position_embeddings'"),
        ({"pad_token_id": [0]}, r"'pad_token_id'|pad_token_id in config\.json of '.*' is \[0\]"),
        ({"pad_token_id": -7}, r"pad_token_id in config\.json of '.*' is -7; write a token's id, or null for none"),
        ({"eos_token_id": "2"}, r"eos_token_id"),
        ({"architectures": "LlamaFor"}, r"architectures in config\.json of '.*' is 'LlamaFor'; it must be a list"),
        ({"architectures": [5]}, r"architectures in config\.json of '.*' is \[5\]; it must be a list of names"),
        ({"model_type": [5]}, r"model_type in config\.json of '.*' is \[5\]; it must be text"),
        ({"text_config": [1]}, r"text_config in config\.json of '.*' is \[1\]; it must be an object"),
        (
            {"quantization_config": "4bit"},
            r"quantization_config in config\.json of '.*' is '4bit'; it must be an object",
        ),
        ({"num_attention_heads": 0}, r"cannot load '.*' \(integer modulo by zero\)"),
        ({"hidden_size": 64, "head_dim": 8}, r"its weights have other shapes than its config\.json says"),
        ({"rope_scaling": {"type": "foo", "factor": 2.0}}, r"'foo' is missing there, or is not known to this transf"),
    ],
)
def test_values_of_config_json_that_are_of_another_type(changed, use, keys, told):
    folder = changed("rm" if use == "reward" else "lm", **keys)
    with pytest.raises(ModelError, match=told) as caught:
        check(use, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", "[1]", r"holds no object|cannot load .* \(list indices"),  # by the version of transformers
        ("generation_config.json", '{"eos_token_id": "2"}', r"eos_token_id in generation_config.* is '2'; write"),
        ("generation_config.json", '{"eos_token_id": [3, -9]}', r"eos_token_id in .* is \[3, -9\]"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', r"model_max_length in .* is 'x'; it must be a number"),
        ("tokenizer.json", '{"version": "1.0"}', r"is missing there, or is not known to this transformers"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid", r"is a pointer .*`git lfs pull`"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid", r"is a pointer .*`git lfs pull`"),
    ],
)  # fmt: skip
def test_files_that_hold_something_else(changed, file, content, told):
    folder = changed("lm")
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match=told) as caught:
        check("policy", folder)
    assert "\n" not in str(caught.value)


def test_a_padding_id_of_minus_one_is_none(models, changed):
    """Of a policy, whose rows of unlike length are filled; of a reward tests/iama/rewards/test_rewards.py has it."""
    sampling = Sampling(max_new_tokens=4)
    found, expected = (
        decode(load_policy("p", PolicySpec(path=str(folder))), [[2, 9, 11], [2]], 3, sampling, seed=0, batch_size=4)
        for folder in (changed("lm", pad_token_id=-1), models / "lm")
    )
    assert found[0] == expected[0]


# ------------------------------------------------------------------ a model with an adapter beside it


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory):
    """An adapter on the language model, as PEFT saves it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(models / "lm")
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("is_long", [True, False])
def test_longrope_is_read_as_far_as_rows_do_not_change_each_other(tmp_path, is_long):
    tokenizer = make_tokenizer()
    short = 24 if is_long else 128
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = tiny_config(tokenizer).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = Phi3Config(
        **{name: sizes[name] for name in (*names, "bos_token_id", "eos_token_id", "pad_token_id")},
        max_position_embeddings=128,
        original_max_position_embeddings=short,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **factors},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", IamaWarning)
        assert read_policy_files("p", PolicySpec(path=str(tmp_path))).context_length == short
    assert ["by longrope, where a row of more than 24" in str(warning.message) for warning in told] == [True] * is_long


@pytest.mark.parametrize("use", ["policy", "reward", "--base"])
def test_a_merged_model_beside_its_adapter_config_is_refused(models, adapter, tmp_path, use):
    """transformers would put the adapter on it again."""
    folder = shutil.copytree(models / ("rm" if use == "reward" else "lm"), tmp_path / "merged")
    shutil.copy(adapter / "adapter_config.json", folder)
    with pytest.raises(
        ModelError,
        match=r"if it is merged already, delete adapter_config\.json, else move the adapter's files out",
    ):
        check(use, folder)


def test_an_adapter_folder_may_hold_its_bases_configuration(models, adapter, tmp_path):
    """Some trainers save it so; only weights make a folder a whole model."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    shutil.copy(models / "lm" / "config.json", folder)
    assert read_policy_files("p", PolicySpec(path=str(folder))).context_length == 128
    with pytest.raises(ModelError, match="is an adapter, and here a whole model is needed; give its base, or merge it"):
        check_model_dir(str(folder), "policy.path")


def test_an_adapter_of_another_task_or_with_tensors_that_have_no_place(models, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(models / "rm")}))
    with pytest.raises(ModelError, match="was trained for CAUSAL_LM, and is used for SEQ_CLS"):
        load_reward("r", RewardSpec(model=str(folder)))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights | {"base_model.model.score.bias": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(
        ModelError, match=r"1 of its tensors have no place there, e\.g\. 'base_model\.model\.score\.bias'"
    ):
        load_policy("p", PolicySpec(path=str(models / "lm"), adapter=str(folder)))


# ------------------------------------------------------------------ what libraries raise, devices, revisions


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("FlashAttention2 needs\nflash_attn"), "needs a package that is not installed"),
        (RuntimeError("shapes differ"), r"cannot load 'x'|no folder here"),
        (NotImplementedError("no kernel"), "no kernel"),
        (AssertionError("Torch not compiled with CUDA enabled"), "not compiled"),
        (AttributeError("'X' has no attribute 'y'"), "no attribute"),
        (UnboundLocalError("local variable"), "local variable"),
        (ValueError("pass `trust_remote_code=True` to allow"), "brings code of its own"),
    ],
)
def test_what_libraries_raise_is_one_line(error, told):
    with pytest.raises(ModelError, match=told) as caught, loading("x", "policy"):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "xpu"])
def test_a_device_that_is_not_here(models, device):
    with pytest.raises(ModelError, match=rf"^reward 'r': device '{device}', but torch finds 0 .* devices; write auto"):
        check_reward("r", RewardSpec(model=str(models / "rm"), device=device))
    with pytest.raises(ModelError, match=rf"^policy 'p': device '{device}', but torch finds 0"):
        read_policy_files("p", PolicySpec(path=str(models / "lm"), device=device))
    with pytest.raises(ModelError, match="not known to torch"):
        pick_device("meta")


def test_a_revision_of_weights_is_of_the_weights_alone(models, tmp_path):
    folder = shutil.copytree(models / "lm", tmp_path / "lm")
    recorded = weights_revision(str(folder))
    (folder / "generation_config.json").write_text("{}")
    assert not is_other_revision(recorded, str(folder))
    assert not is_other_revision(None, str(folder))
    assert not is_other_revision("0" * 40, str(folder))  # a commit of the hub
    shutil.copy(models / "rm" / "model.safetensors", folder)
    assert is_other_revision(recorded, str(folder))


def test_weights_that_changed_after_an_adapter_was_trained_are_told_of(models, adapter, tmp_path):
    base, trained = shutil.copytree(models / "lm", tmp_path / "lm"), shutil.copytree(adapter, tmp_path / "adapter")
    manifest = {
        "base_model": str(base),
        "criteria": [{"name": "a", "operator": "mean", "weight": 1.0, "reward": {"function": "m:f"}}],
        "estimator": "auto",
        "sampling": {},
        "seed": 0,
        "versions": {},
    }
    spec = PolicySpec(path=str(base), adapter=str(trained))
    for recorded in ({}, {"base_revision": weights_revision(str(base))}):
        (trained / "iama.json").write_text(json.dumps(manifest | recorded))
        read_policy_files("p", spec)  # a warning would be an error
    weights = load_file(base / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(IamaWarning, match=r"^policy 'p': the weights in '.*' are not those that the adapter '.*' was"):
        read_policy_files("p", spec)


@pytest.mark.parametrize("command", ["generate", "pool", "evaluate", "train", "standardise", "score", "distill"])
def test_every_command_refuses_such_models_in_one_line(run, models, adapter, tiny, tmp_path, command):
    """A merged model beside its adapter_config.json as policy, base or reward, dry or not; nothing is written."""
    folder = shutil.copytree(models / ("rm" if command == "score" else "lm"), tmp_path / "merged")
    shutil.copy(adapter / "adapter_config.json", folder)
    reward = {"model": str(tiny.reward)}
    training = {
        "name": "t",
        "output_dir": str(tmp_path / "out"),
        "policy": {"path": str(folder)},
        "prompts": str(tiny.prompts),
        "objective": {"criteria": [{"name": "a", "proxy": reward, "operator": "bon(2)"}]},
        "trainer": {"max_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4},
    }
    evaluation = {
        "name": "e",
        "output_dir": str(tmp_path / "out"),
        "policies": {"base": {"path": str(folder)}},
        "trained": "base",
        "references": [],
        "prompts": str(tiny.prompts),
        "criteria": [{"name": "a", "proxy": reward}],
        "methods": ["bon"],
    }
    config, pool = tmp_path / "config.yaml", tmp_path / "pool.jsonl"
    config.write_text(json.dumps(evaluation if command == "evaluate" else training))
    texts = [{"prompt": f"bake {i}", "text": text, "scores": {"a": i}} for i, text in enumerate("abab")]
    texts += [{"prompt": row["prompt"], "text": "c", "scores": {"a": 5}} for row in texts]
    pool.write_text("".join(json.dumps(row) + "\n" for row in [{"iama_pool": 1, "policy": {"name": "b"}}, *texts]))
    arguments = {
        "generate": ["--policy", folder, "--prompt", "bake", "--method", "single"],
        "pool": [tmp_path / "out", "--prompts", tiny.prompts, "--policy", folder, "--n", 2],
        "evaluate": ["--config", config, "--dry-run"],
        "train": ["--config", config, "--dry-run"],
        "standardise": ["--config", config],
        "score": [pool, "--column", "b", "--reward", folder],
        "distill": [pool, "--column", "a", "--base", folder, "--out", tmp_path / "out"],
    }
    code, _, err = run(command, *arguments[command])
    assert (code, err.count("error: ")) == (2, 1)
    assert "holds a whole model and adapter_config.json, and transformers would put that adapter on it" in err
    assert not (tmp_path / "out").exists()
