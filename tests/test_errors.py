"""User errors: one line, exit status 1, no traceback."""

import pytest
from torch._utils import ExceptionWrapper

from reclip_d2.errors import ReclipError, exit_on_error


def run(error: BaseException, capsys) -> str:
    @exit_on_error
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_one_line_and_exit_status_1(capsys):
    assert run(ReclipError("image x.jpg is broken: remove it"), capsys) == "error: image x.jpg is broken: remove it\n"


def test_an_error_of_a_data_loading_worker_is_one_line_too(capsys):
    """torch wraps a worker's exception: its message becomes the worker's whole traceback."""
    try:
        try:
            raise OSError("truncated")
        except OSError as error:
            raise ReclipError("image x.jpg cannot be read (truncated): remove it") from error
    except ReclipError:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(ReclipError) as caught:
        wrapper.reraise()
    assert "Traceback" in str(caught.value)
    assert run(caught.value, capsys) == "error: image x.jpg cannot be read (truncated): remove it\n"


def test_other_errors_pass():
    @exit_on_error
    def main() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        main()


def test_the_result_and_the_arguments_pass():
    @exit_on_error
    def main(a: int, *, b: int) -> int:
        """Adds."""
        return a + b

    assert main(2, b=3) == 5
    assert main.__name__ == "main" and main.__doc__ == "Adds."
