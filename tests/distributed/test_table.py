"""Several processes fill one table."""

import multiprocessing

from common import holds, rows_of, table_file


def _append_many(folder, start, rows):
    table = table_file(folder, rows)
    for begin in range(start, rows, 10):
        table.append(*rows_of(*range(begin, min(begin + 10, rows))))


def test_two_processes_fill_one_table(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append_many, args=(tmp_path, start, 500)) for start in (0, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert holds(table_file(tmp_path, 500), *range(500))


def _open_together(folder, barrier):
    barrier.wait()
    for number in range(20):
        table_file(folder / str(number))


def test_two_processes_make_one_table(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_open_together, args=(tmp_path, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
