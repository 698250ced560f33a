"""The layout of masked samples that `pretraining.data.samples` describes, and what can be wrong with it."""

import numba
import numpy as np

DTYPES = {
    "input_ids": np.int32,
    "input_mask": np.int8,
    "segment_ids": np.int8,
    "masked_lm_positions": np.int32,
    "masked_lm_ids": np.int32,
}
REQUIRED_ATTRIBUTES = {
    "vocab_sha256": str,
    "vocab_size": int | np.integer,
    "max_seq_length": int | np.integer,
    "source": str,
    "source_sha256": str,
}

# What can be wrong with a sample, by the number that `first_problem` and `first_stranger` give it; 0 is nothing.
INPUT_RANGE, MASKED_RANGE, SEGMENT, LENGTH, PADDING, NO_MASK, OUTSIDE, ORDER = range(1, 9)
UNUSED, MASKED_PAD, ENDS, SPECIAL, MASKED_SPECIAL = range(9, 14)
PROBLEMS = {
    INPUT_RANGE: "input_ids has ids from {low} to {high}, the vocabulary has {size} entries",
    MASKED_RANGE: "masked_lm_ids has ids from {low} to {high}, the vocabulary has {size} entries",
    SEGMENT: "segment_ids is not 0; the models know one segment",
    LENGTH: "input_mask is not 1 at [CLS], one word or more and [SEP], then 0",
    PADDING: "input_ids is not [PAD] where input_mask is 0, and nowhere else",
    NO_MASK: "no masked position",
    OUTSIDE: "a masked position is outside the words of the sentence",
    ORDER: "masked positions don't ascend",
    UNUSED: "masked positions or ids are not 0 after the last mask",
    MASKED_PAD: "a masked id is 0, [PAD]",
    ENDS: "input_ids doesn't begin with [CLS] and end with [SEP]",
    SPECIAL: "a special token stands where a word should, and is not masked",
    MASKED_SPECIAL: "a masked id is a special token",
}


def wrong_attribute(attributes: dict) -> str | None:
    """The first required attribute that is missing or of the wrong type, in words; None if there is none."""
    for name, kind in REQUIRED_ATTRIBUTES.items():
        if name not in attributes:
            return f"attribute {name} is missing"
        if not isinstance(attributes[name], kind):
            return f"attribute {name} is {attributes[name]!r}, of the wrong type"
    return None


def wrong_shape(shapes: dict[str, tuple], attributes: dict) -> str | None:
    """What is wrong with the shapes of the arrays of samples, by name, in words; None if nothing is."""
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[1] == 0:
            return f"{name} has shape {shape}, not two dimensions"
    rows, width = shapes["input_ids"]
    if rows == 0:
        return "no samples"
    if width != attributes["max_seq_length"]:
        return f"input_ids has {width} columns, the attribute max_seq_length is {attributes['max_seq_length']}"
    for name, shape in shapes.items():
        expected = shapes["masked_lm_positions" if name.startswith("masked_lm") else "input_ids"][1]
        if shape != (rows, expected):
            return f"{name} has shape {shape}, expected {(rows, expected)}"
    return None


@numba.njit(cache=True, nogil=True)
def first_problem(input_ids, input_mask, segment_ids, masked_lm_positions, masked_lm_ids, vocab_size):
    """Number of the first thing that is wrong with the layout of samples, and its row; (0, 0) if nothing is."""
    rows, width = input_ids.shape
    for row in range(rows):
        length = 0
        while length < width and input_mask[row, length] == 1:
            length += 1
        ids_out_of_range, padding_wrong, segments, rest = False, False, False, False
        for column in range(width):
            index = input_ids[row, column]
            ids_out_of_range |= index < 0 or index >= vocab_size
            padding_wrong |= (index == 0) != (column >= length)
            segments |= segment_ids[row, column] != 0
            rest |= column >= length and input_mask[row, column] != 0
        if ids_out_of_range:
            return INPUT_RANGE, row
        if segments:
            return SEGMENT, row
        if rest or length < 3:
            return LENGTH, row
        if padding_wrong:
            return PADDING, row
        problem = _wrong_masks(masked_lm_positions[row], masked_lm_ids[row], length, vocab_size)
        if problem:
            return problem, row
    return 0, 0


@numba.njit(cache=True, nogil=True)
def _wrong_masks(positions, ids, length, vocab_size):
    """Number of what is wrong with the masks of a sample of `length` tokens, or 0."""
    masks = 0
    while masks < len(positions) and positions[masks] != 0:
        masks += 1
    if masks == 0:
        return NO_MASK
    for mask in range(len(positions)):
        if ids[mask] < 0 or ids[mask] >= vocab_size:
            return MASKED_RANGE
        if mask >= masks:
            if positions[mask] != 0 or ids[mask] != 0:
                return UNUSED
        elif positions[mask] < 1 or positions[mask] > length - 2:
            return OUTSIDE
        elif mask > 0 and positions[mask] <= positions[mask - 1]:
            return ORDER
        elif ids[mask] == 0:
            return MASKED_PAD
    return 0


@numba.njit(cache=True, nogil=True)
def first_stranger(input_ids, input_mask, masked_lm_positions, masked_lm_ids, is_special, cls_id, sep_id):
    """As `first_problem`, of samples that it accepts: special tokens that are not where they belong."""
    rows, width = input_ids.shape
    for row in range(rows):
        last = 2
        while last + 1 < width and input_mask[row, last + 1] == 1:
            last += 1
        if input_ids[row, 0] != cls_id or input_ids[row, last] != sep_id:
            return ENDS, row
        masks = 0
        for column in range(1, last):
            if masks < masked_lm_positions.shape[1] and masked_lm_positions[row, masks] == column:
                if is_special[masked_lm_ids[row, masks]]:
                    return MASKED_SPECIAL, row
                masks += 1
            elif is_special[input_ids[row, column]]:
                return SPECIAL, row
    return 0, 0
