"""Files in the .parquet format of the user's own, read row by row."""
import contextlib

import pyarrow.parquet as pq

from shards import Fault, check_file, first_line


@contextlib.contextmanager
def opened(path):
    """A .parquet file as pyarrow.parquet.ParquetFile. Whatever goes wrong while it is open becomes a Fault."""
    try:
        check_file(path)
        with pq.ParquetFile(path) as file:
            yield file
    except Fault:
        raise
    except Exception as error:  # of a damaged file pyarrow raises many kinds, IndexError and UnicodeDecodeError too
        raise Fault(f"{path} is damaged or no .parquet file ({first_line(error)})") from None


def column_names(path):
    """The columns of a file, a list. Raises Fault."""
    with opened(path) as file:
        return file.schema_arrow.names


def read_rows(path, columns=None, together=64):
    """Yield (number from 1 on, {column: value}) of every row, with all columns or with those named that there are.
    Raises Fault.

    together: rows that are in memory at once.
    """
    number = 0
    with opened(path) as file:
        for batch in file.iter_batches(together, columns=columns):
            for number, row in enumerate(batch.to_pylist(), number + 1):
                yield number, row
