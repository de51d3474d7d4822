"""Read the tensors of a file, whatever program has written it."""

from __future__ import annotations

import dataclasses
import os
import pickle
import zipfile
from typing import Any

from reclip_d2.errors import ReclipError, is_user_error
from reclip_d2.utils.files import StrPath, open_regular
from reclip_d2.utils.tensor_files import kinds
from reclip_d2.utils.tensor_files.archives import DamagedError, read_archive, read_legacy, read_pickle
from reclip_d2.utils.tensor_files.safetensors_file import read_safetensors

_HEAD = 512


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What a file holds.

    Attributes:
        content: what was saved: tensors and NumPy arrays in plain containers.
        metadata: texts of a safetensors header; empty for others.
        is_torchscript: whether it is a TorchScript archive.
    """

    content: Any
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    is_torchscript: bool = False


def read_tensor_file(path: StrPath, what: str, shown: str | None = None) -> TensorFile:
    """Content of a weight file: safetensors, ``torch.save``'s (new or old), TorchScript, or pickled NumPy arrays.

    The format is told by the content, not by the name. Nothing in the file is executed; checksums are verified, and
    what the file would unpack to is compared with its size before it is read.

    Args:
        what: what the file is to the user, for errors: ``"checkpoint"``, ``"MODEL.CLIP.PRETRAINED"``.
        shown: the name of the file in errors, if it is not the path.

    Raises:
        MissingFileError: the file does not exist.
        ReclipError: it is no regular file, no weight file, damaged, or holds code.
    """
    name = f"{what} {shown or os.fspath(path)}"
    try:
        with open_regular(path, what) as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(_HEAD)
            stream.seek(0)
            kind = kinds.kind_of(head)
            if kind is None:
                raise ReclipError(f"{name} cannot be read as tensors: it is {kinds.describe(head)}")
            if kind == kinds.SAFETENSORS:
                return TensorFile(*read_safetensors(path, stream, size))
            if kind == kinds.ARCHIVE:
                content, torchscript = read_archive(stream, size)
                return TensorFile(content, is_torchscript=torchscript)
            return TensorFile((read_legacy if kind == kinds.LEGACY else read_pickle)(stream, size))
    except DamagedError as error:
        raise ReclipError(f"{name} cannot be read as tensors: it {error}") from error
    except zipfile.BadZipFile as error:
        raise ReclipError(
            f"{name} cannot be read as tensors: it is cut short or damaged, copy or download it again"
        ) from error
    except pickle.UnpicklingError as error:
        raise ReclipError(f"{name} cannot be read as tensors: {error}") from error
    except Exception as error:  # reading rubbish as an archive or a pickle may raise nearly anything
        if is_user_error(error):  # also memory that ran out
            raise
        raise ReclipError(
            f"{name} cannot be read as tensors ({type(error).__name__}): it is damaged, copy or download it again"
        ) from error
