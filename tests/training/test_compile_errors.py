"""A damaged library that torch.compile has kept: the message names it and the folder to delete."""

import ctypes
from pathlib import Path

import pytest

from megatron_nexus.errors import TrainingError
from megatron_nexus.training.torch_errors import explaining_damaged_libraries


@pytest.mark.parametrize(
    ("content", "why"), [(b"\x7fELF", "file too short"), (b"x" * 99, "invalid ELF header")]
)
def test_a_damaged_library_is_named_with_the_folder_to_delete(
    content: bytes, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    library = tmp_path / "kept" / "ab" / "cabc.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(content)
    with (
        pytest.raises(TrainingError, match=rf"rank 3 on .* finds {library} damaged \({why}\)") as caught,
        explaining_damaged_libraries(3),
    ):
        ctypes.CDLL(str(library))
    assert f"Delete {tmp_path / 'kept'} and start again" in str(caught.value)
    other = tmp_path / "other.so"
    other.write_bytes(content)
    with pytest.raises(OSError, match=why), explaining_damaged_libraries(3):
        ctypes.CDLL(str(other))
