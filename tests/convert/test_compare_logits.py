"""The command compare: its numbers by hand, its verdict and its exit code."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalign.commands.compare import main
from megalign.convert.logits import logit_gap
from tests.support.tiny_checkpoints import write_checkpoint


def test_numbers_by_hand():
    # first token: p = (1/2, 1/2) against (3/4, 1/4): KL = 1/2 log(2/3) + 1/2 log 2; second token: the same
    a_TV = torch.tensor([[0.0, 0.0], [4.0, 2.0]])
    b_TV = torch.tensor([[math.log(3.0), 0.0], [4.0, 2.0]])
    difference = logit_gap(a_TV, b_TV)
    assert difference.max_abs == pytest.approx(math.log(3.0))
    assert difference.max_relative == pytest.approx(math.log(3.0) / 4)
    assert difference.same_top1 == 1.0
    assert difference.mean_kl == pytest.approx((math.log(2 / 3) + math.log(2)) / 2 / 2)
    assert difference.within(0.28) and not difference.within(0.27)
    assert logit_gap(a_TV, torch.tensor([[0.0, 1.0], [4.0, 2.0]])).same_top1 == 0.5
    assert not logit_gap(a_TV, b_TV * math.nan).within(1.0)


def test_verdicts(checkpoints, tmp_path, capsys):
    source = checkpoints("llama-bias")
    assert main([str(source), str(source), "--tokens", "9"]) == 0
    assert "EQUAL" in capsys.readouterr().out
    other = write_checkpoint(tmp_path / "other", "llama-bias")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 1.001
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    arguments = [str(source), str(other), "--tokens", "9"]
    assert main(arguments) == 1
    assert "DIFFERENT" in capsys.readouterr().out
    # every logit grows by 0.1 %: relative to the largest that is 1e-3, up to rounding
    assert main([*arguments, "--tolerance", "1.01e-3"]) == 0
    assert main([*arguments, "--tolerance", "0.99e-3"]) == 1


def test_wrong_input(checkpoints, tmp_path, capsys):
    source = str(checkpoints("llama-bias"))

    def refusal(*arguments):
        capsys.readouterr()  # of writing a checkpoint
        assert main(list(arguments)) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "nowhere is not a directory" in refusal(source, "nowhere")
    assert "a prompt has 65 tokens; max_position_embeddings is 64" in refusal(source, source, "--tokens", "65")
    wider = write_checkpoint(tmp_path / "wider", "llama-bias", vocab_size=132)
    assert "vocab_size is 131" in refusal(source, str(wider))
    assert "--text is" in refusal(source, source, "--text", str(tmp_path / "none.txt"))
    holed = write_checkpoint(tmp_path / "holed", "llama-bias")
    tensors = load_file(holed / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, holed / "model.safetensors", metadata={"format": "pt"})
    assert "missing keys: model.norm.weight" in refusal(source, str(holed))
    (holed / "model.safetensors").write_bytes(b"short")
    assert "does not load" in refusal(source, str(holed))
    with pytest.raises(SystemExit) as stop:
        main([source, source, "--tokens", "0"])
    assert stop.value.code == 2
