import json
import subprocess
import sys

import hypothesis
import pytest

from helpers import save_tiny_model, train_tokenizer

hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


@pytest.fixture(scope="session")
def smollm2():
    """The path of the packaged model, a GGUF file."""
    from star_attention.models.checkpoint import find_model

    return find_model("smollm2")


@pytest.fixture(scope="session")
def hf_smollm2(smollm2):
    """The packaged model as Hugging Face's own code reads and runs it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="session")
def smollm2_folder(smollm2, hf_smollm2, tmp_path_factory):
    """The same as a Hugging Face folder, which loads in a fraction of the GGUF file's time."""
    from safetensors.torch import save_file

    from star_attention.models.tokenizer import save_tokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    tensors = hf_smollm2.state_dict()
    del tensors["lm_head.weight"]  # the embedding again
    save_file(tensors, folder / "model.safetensors")
    config = {**hf_smollm2.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    save_tokenizer(smollm2, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory):
    """A random model with a chat template, in a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder, vocab_size=700, max_position_embeddings=2048)
    return train_tokenizer(folder, "llama3")


@pytest.fixture
def here(monkeypatch, capsys):
    """`star_attn` without a process of its own."""
    from star_attention.cli import main as cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["star-attn", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run
