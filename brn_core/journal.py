"""Which batch a rank began to send last, on disk: a resumed training repeats steps, and their rows are stored once.

A training that was killed goes on from its checkpoint and does some steps again, whose rows may be stored already, or
lie in the spool. Batches are sent one after the other, so when one is begun every earlier one is settled: stored,
spooled or given up. Noted before it is sent, the newest batch parts the steps in three:

    ... settled | first ... last | new ...
    not sent      sent again as    sent under
    again         one batch, by    new numbers
                  its old number

and the service takes each number once. It need not be asked, nor be up.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from brn_core.atomic import replacing


class Begun(BaseModel):
    """A batch that was about to be sent: its number, and the first and last step in it."""

    model_config = ConfigDict(frozen=True)

    run: str
    seq: int
    first: int
    last: int


class Journal:
    """The newest batch of one rank, in a file.

    Args:
        path: the file; its folder is there. Give the recorder of the resumed training the same one.
        run: run id; what another run has left there is no concern of this one.
        start_step: first step of this process.

    Attributes:
        repeated: the batch to be sent again by its old number; None: everything is new.
    """

    def __init__(self, path: Path, run: str, start_step: int) -> None:
        self._path, self._run = path, run
        try:
            found = Begun.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):  # none yet; they are replaced whole, so there is no half one
            found = None
        self.repeated = found if found is not None and found.run == run and found.last >= start_step else None

    def begin(self, seq: int, first: int, last: int) -> None:
        """Note a batch that is about to be sent; every earlier one is settled.

        Raises:
            OSError: the file cannot be written.
        """
        with replacing(self._path) as file:
            file.write(Begun(run=self._run, seq=seq, first=first, last=last).model_dump_json().encode())
