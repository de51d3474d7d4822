"""Weight files: read without executing anything in them, checked before use, and written."""

from reclip_d2.utils.tensor_files.reader import TensorFile, read_tensor_file
from reclip_d2.utils.tensor_files.state import check_tensors, dtype_mismatches, plain_name, state_dict_of
from reclip_d2.utils.tensor_files.writer import save_archive, save_safetensors

__all__ = [
    "TensorFile",
    "check_tensors",
    "dtype_mismatches",
    "plain_name",
    "read_tensor_file",
    "save_archive",
    "save_safetensors",
    "state_dict_of",
]
