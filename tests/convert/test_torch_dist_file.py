"""Files of `torch_dist` checkpoints: any cut of a tensor, from any memory, comes back, and torch reads them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint

from megalign.convert.hf.safetensors_file import Spec
from megalign.convert.megatron import torch_dist_file
from megalign.convert.megatron.torch_dist import TorchDistReader
from megalign.convert.megatron.torch_dist_file import ALIGNMENT, TorchDistFile, write_index
from megalign.files import checksum
from megalign.schema import UserError

WHOLE = torch.arange(7 * 6 * 5, dtype=torch.float32).view(7, 6, 5)
CUTS = [((0, 3), (3, 4), (4, 7)), ((0, 2), (2, 6)), ((0, 5),)]  # of each dimension


def write(folder: Path) -> list[TorchDistFile]:
    """Two files: the even and the odd parts of WHOLE, and tensors that are not contiguous, empty, or one number."""
    folder.mkdir(exist_ok=True)
    files = [TorchDistFile(folder / f"__{rank}_0.distcp") for rank in range(2)]
    for number, ranges in enumerate(itertools.product(*CUTS)):
        part = WHOLE[tuple(slice(*one) for one in ranges)]
        rows = [part[:1], part[1:]] if number % 3 else [part]
        files[number % 2].append("whole", [begin for begin, _ in ranges], part.shape, rows)
    files[0].append("turned", (0, 0), (5, 6), [WHOLE[0].T])
    files[1].append("zeros", (0,), (1000,), [torch.zeros(1, dtype=torch.bfloat16).expand(1000)])
    files[1].append("scalar", (), (), [torch.tensor(3.5)])
    files[0].append_object("object", {"a": torch.ones(2)})
    for file in files:
        file.close()
    specs = {"whole": Spec((7, 6, 5), torch.float32), "turned": Spec((5, 6), torch.float32)}
    specs |= {"zeros": Spec((1000,), torch.bfloat16), "scalar": Spec((), torch.float32)}
    write_index(folder, specs, {file.file.path.name: file.entries for file in files}, {"step": 3})
    return files


@pytest.mark.parametrize("staged", [64, 1 << 26])
def test_every_region_comes_back(staged, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist_file, "STAGED_BYTES", staged)
    files = write(tmp_path)
    for file in files:
        assert all(begin % ALIGNMENT == 0 for *_, begin, _ in file.entries)
        assert [file.file.size, file.file.crc] == [file.file.path.stat().st_size, checksum(file.file.path)]
    reader = TorchDistReader(tmp_path)
    ends = [list(itertools.combinations(range(size + 1), 2)) for size in WHOLE.shape]
    for (a, b), (c, d), (e, f) in itertools.product(ends[0], ends[1][::4], ends[2][::5]):
        out = torch.full((b - a, d - c, f - e), -1.0)
        reader.read_into("whole", (a, c, e), out)
        assert torch.equal(out, WHOLE[a:b, c:d, e:f])
    assert torch.equal(reader.read("turned"), WHOLE[0].T) and reader.read("scalar") == 3.5
    assert reader.read("zeros").dtype == torch.bfloat16 and not reader.read("zeros").any()
    assert reader.object("object")["a"].tolist() == [1, 1] and reader.common() == {"step": 3}


def test_torch_reads_them(tmp_path):
    write(tmp_path)
    found = {"whole": torch.zeros(7, 6, 5), "turned": torch.zeros(5, 6), "zeros": torch.ones(1000).bfloat16()}
    torch_checkpoint.load(found, checkpoint_id=str(tmp_path), no_dist=True)
    assert torch.equal(found["whole"], WHOLE) and torch.equal(found["turned"], WHOLE[0].T)
    assert not found["zeros"].any()


def test_what_does_not_fit_is_refused(tmp_path):
    file = TorchDistFile(tmp_path / "a")
    with pytest.raises(ValueError, match=r"x is announced as torch.float32 \(3,\), and comes as"):
        file.append("x", (0,), (3,), [torch.zeros(2)])
    file.append("x", (1,), (2,), [torch.ones(2)])
    file.close()
    write_index(tmp_path, {"x": Spec((3,), torch.float32)}, {"a": file.entries}, {})
    with pytest.raises(UserError, match=r"tensor x has 2 of 3 values at \[0\]"):
        TorchDistReader(tmp_path).read("x")
    with pytest.raises(UserError, match="nowhere/a cannot be written: No such file"):
        TorchDistFile(tmp_path / "nowhere" / "a")
