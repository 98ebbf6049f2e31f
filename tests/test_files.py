"""data.py: what users bring. Names, pictures, folders, streams, processes that read."""

import errno
import os
import subprocess
import sys

import pytest
import torch

import data
from data import UserError


@pytest.mark.parametrize("flag, text, said", [
    ("count", "0", "--n is 0; expected 1 or more"), ("natural", "-1", "--n is -1; expected 0 or"),
    ("count", "many", "--n is many; expected 1 or more"), ("share", "2", "--n is 2.0; expected 0"),
    ("share", "nan", "--n is nan; expected 0 to 1"), ("positive", "inf", "--n is inf; expected"),
    ("positive", "0", "--n is 0.0; expected more than 0"),
    ("seed", str(1 << 63), f"--n is {1 << 63}; expected an integer of 64 bits"),
    ("path", None, "argument --n: expected one argument")])
def test_values_on_a_command_line(flag, text, said):
    parser = data.Parser()
    parser.add_argument("--n", type=getattr(data, flag))
    with pytest.raises(UserError) as error:
        parser.parse_args(["--n"] + ([text] if text else []))
    assert str(error.value).startswith(said)


def test_good_values_on_a_command_line(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    parser = data.Parser()
    for name in ("count", "natural", "share", "positive", "seed", "path"):
        parser.add_argument(f"--{name}", type=getattr(data, name))
    args = parser.parse_args("--count 1 --natural 0 --share 1 --positive 1e-9 --seed -3 "
                             "--path ~/x".split())
    assert vars(args) == dict(count=1, natural=0, share=1.0, positive=1e-9, seed=-3,
                              path=data.Path("/home/somebody/x"))


def test_names_are_printed_escaped(capsys):
    name = "a\x1b[2J\nerror: b\udcff é.jpg"
    assert data.printable(name) == "a\\x1b[2J\\nerror: b\\udcff é.jpg"

    @data.clean_exit
    def fail():
        raise UserError(f"no image {name}")

    with pytest.raises(SystemExit):
        fail()
    assert capsys.readouterr().err == f"error: no image {data.printable(name)}\n"


def test_fingerprints_of_strings_bytes_and_tensors():
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert data.fingerprint("abc") == "ba7816bf8f01cfea" == data.fingerprint(b"a", "bc")
    assert data.fingerprint(value.T) == data.fingerprint(value.T.contiguous().numpy().tobytes())


class Numbers(torch.utils.data.Dataset):
    """Item k: a nest of tensors; some items raise, kill their process, or cannot be sent."""

    def __getitem__(self, k):
        if k == "mistake":
            raise UserError("cannot read image x.jpg")
        if k == "disk":
            raise OSError(errno.EIO, "Input/output error", "x.jpg")
        if k == "death":
            os._exit(1)
        if k == "odd":
            return lambda: 0
        return {"x": torch.full((2, 3), k), "rest": (torch.tensor(True), [k, "text"])}


def test_reading_ahead_gives_the_same_items_in_order():
    for workers in (0, 2):
        items = list(data.read_ahead(Numbers(), iter([3, 1, [4, 1]]), workers))
        assert items[0]["rest"][0].dtype == torch.bool and items[0]["rest"][1] == [3, "text"]
        assert [item["x"].tolist() for item in items[:2]] == [[[3] * 3] * 2, [[1] * 3] * 2]
        assert items[2]["x"].shape == (2, 2, 3) and items[2]["x"][:, 0, 0].tolist() == [4, 1]
        items[0]["x"] += 1  # may be written to
        lists = list(data.read_ahead(Numbers(), [[1, 2]], workers, list))
        assert [item["x"][0, 0].item() for item in lists[0]] == [1, 2]


@pytest.mark.parametrize("key, said", [
    ("mistake", "error: cannot read image x.jpg"), ("disk", "error: cannot use x.jpg: Input/output"),
    ("death", "error: a process that reads images has died")])
def test_what_goes_wrong_in_a_worker_is_one_line(key, said, capsys):
    with pytest.raises(SystemExit) as end:
        data.clean_exit(lambda: list(data.read_ahead(Numbers(), [1, key, 2, 3, 4, 5], 1)))()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith(said) and err.count("\n") == 1


def test_what_cannot_be_sent_ends_too():
    with pytest.raises(Exception, match="pickle"):
        list(data.read_ahead(Numbers(), ["odd"], 1))


def test_no_room_for_processes_is_one_line(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", refuse)
    with pytest.raises(UserError, match="shared memory.*--workers 0"):
        list(data.read_ahead(Numbers(), [1], 1))


def test_a_closed_pipe_ends_nothing(tmp_path):
    code = ("import sys, data\n@data.clean_exit\ndef main():\n"
            "    for n in range(9999):\n        print('line', n, flush=True)\n"
            f"    open({str(tmp_path / 'end')!r}, 'w')\nmain()\n")
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, cwd=data.Path(data.__file__).parent)
    command.stdout.read(1)
    command.stdout.close()
    assert command.stderr.read() == b"" and command.wait() == 0
    assert (tmp_path / "end").exists()
