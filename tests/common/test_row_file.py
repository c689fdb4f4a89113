"""Files of rows: torn and foreign rows are found, several processes write at once."""

import os
import signal

import numpy as np

from d2distill.common import row_file
from d2distill.common.row_file import RowFile
from tests.processes import exit_code, start

WORDS = 5


def rows_of(numbers):
    """What the tests write: a function of the row's number, with zeros and NaN's bits among it."""
    rows = np.random.default_rng(0).integers(0, 2**64, (1000, WORDS), np.uint64)[numbers]
    rows[:, 1], rows[:, 2] = 0, 0x7FF8_0000_7FC0_0000
    return rows


def test_rows_come_back_and_others_are_not_valid(tmp_path):
    file, numbers = RowFile(tmp_path / "a.rows", 1000, WORDS), np.array([7, 3, 999, 0])
    assert not file.read(np.arange(1000))[1].any()
    file.write(numbers, rows_of(numbers))
    for reader in (file, RowFile(tmp_path / "a.rows", 1000, WORDS)):
        rows, valid = reader.read(np.array([0, 999, 5, 3, 3]))
        assert valid.tolist() == [True, True, False, True, True]
        assert np.array_equal(rows[valid], rows_of([0, 999, 3, 3]))


def test_only_written_rows_take_disk(tmp_path):
    file = RowFile(tmp_path / "a.rows", 10_000_000, WORDS)
    file.write(np.array([5_000_000]), rows_of([1]))
    assert os.path.getsize(tmp_path / "a.rows") == 10_000_000 * 8 * (WORDS + 1)
    assert file.bytes_on_disk() < 100_000


def test_every_changed_bit_and_every_cut_is_found(tmp_path):
    numbers, path = np.array([2, 4]), tmp_path / "a.rows"
    file = RowFile(path, 10, WORDS)
    file.write(numbers, rows_of(numbers))
    whole, size = path.read_bytes(), 8 * (WORDS + 1)

    def valid_with(row):
        with open(path, "r+b") as out:
            out.seek(2 * size)
            out.write(row)
        return file.read(numbers)[1].tolist()

    row = whole[2 * size : 3 * size]
    assert valid_with(row) == [True, True]
    for bit in range(8 * size):
        if bit != 8 * (size - 8):  # the lowest bit of the checksum is always 1
            changed = bytearray(row)
            changed[bit // 8] ^= 1 << bit % 8
            assert valid_with(changed) == [False, True], bit
    for cut in range(1, size):
        if any(row[cut:]):
            assert valid_with(row[:cut] + bytes(size - cut)) == [False, True], cut
    # Another row's, as a write to a wrong place would leave.
    assert valid_with(whole[4 * size : 5 * size]) == [False, True]


def test_a_file_grows_and_never_shrinks(tmp_path):
    small = RowFile(tmp_path / "a.rows", 10, WORDS)
    small.write(np.arange(10), rows_of(np.arange(10)))
    large = RowFile(tmp_path / "a.rows", 500, WORDS)
    large.write(np.array([499]), rows_of([499]))
    again = RowFile(tmp_path / "a.rows", 10, WORDS)
    assert again.read(np.arange(10))[1].all() and large.read(np.array([9, 499]))[1].all()


def write_all(path, rows, seed):
    """All rows in an order of its own, in small writes, and again where one turned out torn."""
    file, order = RowFile(path, rows, WORDS), np.random.default_rng(seed).permutation(rows)
    for numbers in np.split(order, 50):
        file.write(numbers, rows_of(numbers))
        read, valid = file.read(order)
        assert np.array_equal(read[valid], rows_of(order[valid]))


def test_two_processes_write_the_same_rows_at_once(tmp_path):
    path = tmp_path / "a.rows"
    processes = [start(write_all, path, rows, seed) for seed, rows in enumerate((1000, 500))]
    assert [exit_code(process) for process in processes] == [0, 0]
    rows, valid = RowFile(path, 1000, WORDS).read(np.arange(1000))
    # The one that makes the file longer may have spoiled the checksum of one row.
    assert valid.sum() >= 999 and np.array_equal(rows[valid], rows_of(np.arange(1000))[valid])


def die_in_a_write(path):
    write = os.pwrite

    def half(file, data, offset):
        write(file, bytes(data.data)[:20], offset)
        os.kill(os.getpid(), signal.SIGKILL)

    file = RowFile(path, 10, WORDS)
    file.write(np.array([1]), rows_of([1]))
    row_file.os.pwrite = half
    file.write(np.array([2]), rows_of([2]))


def test_a_kill_within_a_write_leaves_no_valid_row(tmp_path):
    assert exit_code(start(die_in_a_write, tmp_path / "a.rows")) == -signal.SIGKILL
    rows, valid = RowFile(tmp_path / "a.rows", 10, WORDS).read(np.array([1, 2]))
    assert valid.tolist() == [True, False] and rows[1].any()
