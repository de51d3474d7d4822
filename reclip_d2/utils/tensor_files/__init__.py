"""Weight files: read without running anything in them, and checked before they are used."""

from reclip_d2.utils.tensor_files.reader import TensorFile, read_tensor_file
from reclip_d2.utils.tensor_files.state import check_tensors, dtype_mismatches, plain_name, state_dict_of

__all__ = ["TensorFile", "check_tensors", "dtype_mismatches", "plain_name", "read_tensor_file", "state_dict_of"]
