"""What an engine's steps cost, and so what a load takes, where prompts are longer than a step reads.

Then requests do not start together: one writes while the next is read. A step that reads costs what its tokens cost of
a whole prompt, and `more` for each request that writes in it; a step that only writes costs `alone` for one request and
`more` for each further one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that are sent at once.

    Attributes:
        requests: How many.
        concurrent: Of them at once.
        prompt: Tokens each reads.
        new: Tokens each writes.
        chunk: Tokens of one step, at most.
    """

    requests: int
    concurrent: int
    prompt: int
    new: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: to read one prompt, of a step of one request that writes, and what each further one adds."""

    prefill: float
    alone: float
    more: float

    @classmethod
    def of(cls, prefill: float, alone: float, load: Load, seconds: float) -> "Costs":
        """Costs by which `load` takes what it took, the first two being known."""
        writing, further = counted(load)
        rest = seconds - load.requests * prefill - writing * alone
        return cls(prefill, alone, max(0.0, rest / further) if further else 0.0)

    def seconds(self, load: Load) -> float:
        """What a load takes."""
        writing, further = counted(load)
        return load.requests * self.prefill + writing * self.alone + further * self.more


def counted(load: Load) -> tuple[int, int]:
    """Steps that only write, and how often a request writes in a step that costs something already."""
    waiting, running = load.requests, []  # of each running request: tokens to read, tokens to write
    writing = further = 0
    while waiting or running:
        room, written, read = load.chunk, 0, 0
        for one in running:
            if one[0] == 0:
                one[1] -= 1
                written, room = written + 1, room - 1
        while room:
            reader = next((one for one in running if one[0]), None)
            if reader is None:
                if not waiting or len(running) == load.concurrent:
                    break
                waiting -= 1
                running.append(reader := [load.prompt, load.new])
            taken = min(room, reader[0])
            reader[0] -= taken
            read, room = read + taken, room - taken
            if reader[0] == 0:
                reader[1] -= 1  # the last chunk gives the first token
        writing += read == 0
        further += written - (read == 0)
        running = [one for one in running if one[1] > 0]
    return writing, further
