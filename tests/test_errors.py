"""User errors: one line, exit status 1, no traceback."""

import errno
import logging
import os
import signal
import urllib.error
from collections.abc import Callable

import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.multiprocessing import ProcessExitedException

from reclip_d2.engine import program
from reclip_d2.engine.logs import UserErrorFilter
from reclip_d2.errors import ReclipError, error_line, exit_on_error, out_of_memory_message


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


def test_a_process_that_failed_has_said_its_line(capsys, monkeypatch):
    """Of a multi-GPU run the launching process ends with exit status 1 and adds nothing."""

    def launch(*_: object, **__: object) -> None:
        raise ProcessExitedException("process 1 terminated", error_index=1, error_pid=7, exit_code=1)

    monkeypatch.setattr(program, "launch_processes", launch)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("sys.argv", ["train_net.py", "--num-gpus", "2"])
    with pytest.raises(SystemExit) as caught:
        program.run_program(program.main)
    assert caught.value.code == 1
    assert capsys.readouterr() == ("", "")


# ---- memory ---------------------------------------------------------------------------------------------------

CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.20 GiB is free."
    "\nOf the allocated memory 13.1 GiB is allocated by PyTorch."
)
ALL_KEYS = ("SOLVER.IMS_PER_BATCH", "INPUT.CROP.SIZE", "HYPOTHESIS.BATCH_SIZE", "TEST.SLIDING_WINDOW.ENABLED")


def called_in(module: str, function: Callable[[], None]) -> Callable[[], None]:
    """A function of the module ``module`` that calls ``function``."""
    namespace = {"__name__": module, "function": function}
    exec("def call():\n    function()", namespace)
    return namespace["call"]


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


def line_of(function: Callable[[], object], capsys) -> str:
    """What a program that calls ``function`` says, without "error: "."""
    with pytest.raises(SystemExit) as caught:
        exit_on_error(function)()
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err[7:-1]


def _fail(message: str) -> None:
    raise ReclipError(message)


def test_a_name_with_line_ends_or_without_end(capsys):
    """The whole message stays, in one line; of a very long one its begin and its end."""
    assert line_of(lambda: _fail("--device cpu\nx is unknown"), capsys) == "--device cpu\\nx is unknown"
    line = line_of(lambda: _fail(f"file {'x' * 5000} does not exist"), capsys)
    assert line.startswith("file xxx") and line.endswith("xxx does not exist") and len(line) == 1205


def test_memory_of_the_cpu(capsys):
    line = line_of(lambda: torch.empty(2**60), capsys)  # 2^60 numbers of four bytes
    assert line.startswith("out of CPU memory (tried to allocate 4611686018427387904 bytes): lower ")
    assert all(key in line for key in ALL_KEYS)


@pytest.mark.cuda
def test_memory_of_the_gpu(capsys):
    line = line_of(lambda: torch.empty(2**48, device="cuda"), capsys)  # 2^50 bytes
    assert line.startswith("out of GPU memory (tried to allocate 1048576.00 GiB): lower ")


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (torch.OutOfMemoryError(CUDA_TEXT), "out of GPU memory (tried to allocate 2.50 GiB): "),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), "out of GPU memory: "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "out of GPU memory: "),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of GPU memory: "),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes."),
            "out of CPU memory (tried to allocate 12 bytes): ",
        ),
        (MemoryError(), "out of CPU memory: "),
    ],
)
def test_what_counts_as_memory(error, start, capsys):
    line = line_of(raising(error), capsys)
    assert line.startswith(start) and all(key in line for key in ALL_KEYS)


@pytest.mark.parametrize(
    ("stack", "keys"),
    [
        (("train_net", "detectron2.engine.train_loop"), {"SOLVER.IMS_PER_BATCH", "INPUT.CROP.SIZE"}),
        (("train_net", "reclip_d2.hypothesis.generate", "reclip_d2.backbones.dense"), {"HYPOTHESIS.BATCH_SIZE"}),
        (("detectron2.evaluation.evaluator", "reclip_d2.modeling"), {"TEST.SLIDING_WINDOW", "INPUT.MIN_SIZE_TEST"}),
        # Evaluation in the middle of a training.
        (("detectron2.engine.train_loop", "detectron2.evaluation.evaluator"), {"TEST.SLIDING_WINDOW"}),
        (("reclip_d2.engine.calibration",), {"INPUT.MIN_SIZE_TEST"}),
        (
            ("reclip_d2.workspace.masks", "reclip_d2.inference.predictor"),
            {"TEST.SLIDING_WINDOW", "INPUT.MIN_SIZE_TEST", "TEST.BAND_MEMORY"},
        ),
        (("detectron2.evaluation.evaluator", "reclip_d2.inference"), {"TEST.SLIDING_WINDOW", "TEST.BAND_MEMORY"}),
        (("reclip_d2.data.datasets.preparation",), {"--workers"}),
        (("reclip_d2.hypothesisX", "reclip_d2"), set(ALL_KEYS)),
    ],
)
def test_the_stack_tells_which_key(stack, keys, capsys):
    function = raising(torch.OutOfMemoryError(CUDA_TEXT))
    for module in reversed(stack):
        function = called_in(module, function)
    line = line_of(function, capsys)
    assert all(key in line for key in keys)
    others = {"SOLVER.IMS_PER_BATCH", "HYPOTHESIS.BATCH_SIZE", "TEST.SLIDING_WINDOW", "--workers"} - keys
    assert not any(key in line for key in others) or keys == set(ALL_KEYS)


class _Killed(torch.utils.data.Dataset):
    """Its process gets a signal as if by the kernel."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGBUS)
        return torch.zeros(2)


def test_a_killed_data_loading_process(capfd):
    with pytest.raises(SystemExit) as caught:
        exit_on_error(lambda: list(torch.utils.data.DataLoader(_Killed(), num_workers=1)))()
    assert caught.value.code == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1  # torch's own "ERROR: Unexpected bus error" ends in a NUL, which comes before ours
    assert "a data-loading process ran out of memory" in lines[0] and "lower DATALOADER.NUM_WORKERS" in lines[0]


def test_other_runtime_errors_are_bugs():
    error = RuntimeError("shape mismatch")
    assert out_of_memory_message(error) is None and error_line(error) is None
    with pytest.raises(RuntimeError):
        exit_on_error(raising(error))()


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/a.pth"), "out/a.pth: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", b"out/\xff"), "out/\\xff: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), "a file: Read-only file system"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a\nb"), "a\\nb: No such file or directory"),
        (urllib.error.URLError(ConnectionRefusedError(111, "Connection refused")), "an address cannot be fetched ("),
        (urllib.error.HTTPError("https://x.y/z.pth", 404, "Not Found", {}, None), "https://x.y/z.pth cannot be"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Abort."), "a data-loading process died ("),
        (RuntimeError("DataLoader worker (pid(s) 3, 4) exited unexpectedly"), "a data-loading process died ("),
        (RuntimeError(GLOO), "another process of this run died"),
        (ProcessExitedException("x", error_index=1, error_pid=3, exit_code=-9, signal_name="SIGKILL"),
         "process 1 of this run was killed by SIGKILL, perhaps out of memory"),
    ],
)  # fmt: skip
def test_what_the_system_does(error, line, capsys):
    printed = line_of(raising(error), capsys)
    assert printed.startswith(line) and len(printed.splitlines()) == 1


def test_library_errors_without_a_cause_are_bugs():
    for error in (OSError("encoder error"), NotImplementedError()):
        assert error_line(error) is None


def test_ctrl_c(capsys):
    for main, text in (
        (exit_on_error(raising(KeyboardInterrupt())), "interrupted"),
        (exit_on_error(interrupted="interrupted: go on")(raising(KeyboardInterrupt())), "interrupted: go on"),
    ):
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 130 and capsys.readouterr().err == f"\n{text}\n"


def test_words_of_a_program(capsys):
    main = exit_on_error(words=lambda line: line.replace("SOLVER.MAX_ITER", "--iterations"))
    assert line_of(main(raising(ReclipError("SOLVER.MAX_ITER 0"))), capsys) == "--iterations 0"


def test_a_process_of_a_run_that_was_interrupted():
    error = ProcessExitedException("x", error_index=1, error_pid=3, exit_code=130)
    with pytest.raises(SystemExit) as caught:
        exit_on_error(raising(error))()
    assert caught.value.code == 130


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (ReclipError("x"), False),
        (torch.OutOfMemoryError(CUDA_TEXT), False),
        (OSError(errno.ENOSPC, "No space left on device", "x.pth"), False),
        (RuntimeError("a bug"), True),
    ],
)
def test_tracebacks_in_the_log(error, kept):
    """Detectron2 logs errors of a training with a traceback; ours is one line at the end."""
    record = logging.LogRecord(
        "x", logging.ERROR, "x.py", 1, "Exception during training:", (), (type(error), error, None)
    )
    assert UserErrorFilter().filter(record) is kept
