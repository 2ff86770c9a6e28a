"""The protocols by which documents are scored, and the rows of the comparison: the one table that all others ask.

A new protocol is an entry in PROTOCOLS and its way of reading in evaluate.py; for a row of the comparison, an entry in
ROWS too.
"""

from dataclasses import dataclass

# Okabe and Ito's palette: told apart with every common kind of colour blindness.
BLACK, BLUE, SKY, VERMILLION, PURPLE = "#000000", "#0072B2", "#56B4E9", "#D55E00", "#CC79A7"


@dataclass(frozen=True)
class Protocol:
    """How a document is scored."""

    name: str
    label: str
    """What is done, for a reader of plots."""
    line: str = "-"
    """How a plot draws it."""
    recurrent: bool = False
    """Whether windows read memory: their own document's, unless a control says otherwise."""
    passes: int = 1
    """How often the text goes through the model, to score each token once."""
    control_of: str | None = None
    """The protocol that it is a control of: the same model, with its memory spoilt."""
    other_documents: bool = False
    """Whether it needs the memory of another document."""

    @property
    def needs_memory(self) -> bool:
        """Whether it says something of recurrent models alone."""
        return self.recurrent or self.control_of is not None

    @property
    def reported(self) -> str:
        """What stands in a result's column "protocol"."""
        return self.control_of or self.name


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("disjoint", "windows apart"),
        Protocol("overlap", "overlapping windows (2x compute)", "--", passes=2),
        Protocol("recurrent", "", recurrent=True),
        Protocol("recurrent+overlap", "overlapping windows (2x compute)", "--", recurrent=True, passes=2),
        Protocol("zeroed", "state removed", ":", control_of="recurrent"),
        Protocol(
            "shuffled", "another document's state", "-.", recurrent=True, control_of="recurrent", other_documents=True
        ),
    )
}


@dataclass(frozen=True)
class Row:
    """One row of the comparison: a model, scored by a protocol."""

    name: str
    model: str
    """base, finetuned (without recurrence) or recurrent."""
    protocol: Protocol
    color: str
    reads: str = ""
    """Who reads so, in the report's first sentence."""

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (MODELS[self.model], self.protocol.label)))


MODELS = {"base": "GPT-2", "finetuned": "finetuned", "recurrent": "with recurrence"}
ROWS = {
    name: Row(name, name.partition("_")[0], PROTOCOLS[protocol], color, *reads)
    for name, protocol, color, *reads in (
        ("base_disjoint", "disjoint", BLACK, "GPT-2 as it is"),
        ("base_overlap", "overlap", BLACK),
        (
            *("finetuned_disjoint", "disjoint", BLUE),
            "the same GPT-2 finetuned without recurrence on the same tokens and steps",
        ),
        ("finetuned_overlap", "overlap", SKY),
        ("recurrent", "recurrent", VERMILLION, "GPT-2 finetuned with recurrence"),
        ("recurrent_overlap", "recurrent+overlap", VERMILLION),
        ("recurrent_zeroed", "zeroed", PURPLE, "that model with its state removed"),
        ("recurrent_shuffled", "shuffled", PURPLE, "that model with another document's state"),
    )
}


def obstacle(protocol: Protocol, recurrent: bool, documents: int) -> str | None:
    """Why a protocol cannot be scored with such a model on so many documents; None if it can."""
    if protocol.needs_memory and not recurrent:
        return "needs a recurrence, which this model has not; give one that has (--recurrence default)"
    if protocol.other_documents and documents < 2:
        return f"needs another document's state, and there is only {documents}; give two documents or more"
    return None
