"""Study files as trees: the line of each key, included files, scales."""

import re
import tomllib
from pathlib import Path

import pytest

from pcfg.common.files import InputError
from pretraining.experiments.study_file import Table, key_lines, read_tree

STUDIES = Path(__file__).parents[2] / "scripts/studies"
TEXT = (
    '''# a comment
title = "a # no comment"
a.b.c = 1
a."d.e" = 2

[t]
text = """
x = 1
[no.table]
"""
many = [
  1,  # ]

  2,
]
inline = { p = 1, q.r = [2] }
"quoted key" = 'it'''
    + """'

[[rows]]
x = 1
[[rows]]
x.y = 2
[rows.z]
v = 3
[u.v.w]
k = 1
[u]
m = 1
"""
)


def test_lines_of_all_kinds_of_keys():
    lines = key_lines(TEXT)
    expected = {
        ("title",): 2,
        ("a", "b", "c"): 3,
        ("a", "d.e"): 4,
        ("t",): 6,
        ("t", "text"): 7,
        ("t", "many"): 11,
        ("t", "inline", "p"): 16,
        ("t", "inline", "q", "r"): 16,
        ("t", "quoted key"): 17,
        ("rows", 0, "x"): 20,
        ("rows", 1): 21,
        ("rows", 1, "x", "y"): 22,
        ("rows", 1, "z", "v"): 24,
        ("u", "v", "w"): 25,
        ("u", "m"): 28,
    }
    assert {keys: lines[keys] for keys in expected} == expected
    assert tomllib.loads(TEXT)["rows"][1]["z"] == {"v": 3}


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_each_key_of_the_shipped_files_stands_on_its_line(path):
    text = path.read_text()
    rows = text.splitlines()
    lines = key_lines(text)
    assert len(lines) >= 5
    for keys, line in lines.items():
        if keys and isinstance(keys[-1], str):
            assert re.search(rf'(^|[\[.{{ "]){re.escape(keys[-1])}(["\] =.]|$)', rows[line - 1]), (keys, rows[line - 1])


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)


def test_included_files_lie_below_and_keep_their_places(tmp_path):
    write(
        tmp_path,
        low='title = "low"\nx = 1\n[t]\na = 1\nb = 2\n[[comparisons]]\nname = "l"',
        more='\n\n[[comparisons]]\nname = "m"',
        top='include = ["low.toml", "more.toml"]\n[t]\nb = 3',
    )
    tree = read_tree(tmp_path / "top.toml")
    assert tree.values == {"x": 1, "t": {"a": 1, "b": 3}, "comparisons": [{"name": "l"}, {"name": "m"}]}
    places = [
        tree.place(keys) for keys in (("x",), ("t", "a"), ("t", "b"), ("comparisons", 0, "name"), ("comparisons", 1, "name"))
    ]
    expected = [("low", 2), ("low", 4), ("top", 3), ("low", 7), ("more", 4)]
    assert [(path.stem, line) for path, line in places] == expected
    write(tmp_path, own='include = ["low.toml", "more.toml"]\n[[comparisons]]\nname = "o"')
    assert read_tree(tmp_path / "own.toml").values["comparisons"] == [{"name": "o"}]


def test_a_scale_lies_over_the_file(tmp_path):
    write(tmp_path, study="x = 1\n[t]\na = 1\nb = 2\n[scales.big]\nx = 2\n[scales.big.t]\nb = 3\n[scales.wrong]\nx = 4")
    path = tmp_path / "study.toml"
    assert read_tree(path).values == read_tree(path, "mini").values == {"x": 1, "t": {"a": 1, "b": 2}}
    big = read_tree(path, "big")
    assert big.values == {"x": 2, "t": {"a": 1, "b": 3}} and big.place(("t", "b"))[1] == 8
    with pytest.raises(InputError, match=r"--scale bog: .*study.toml has no \[scales.bog\]; it has big, mini, wrong"):
        read_tree(path, "bog")
    # What a study says itself counts more than an included file's scale.
    write(tmp_path, top='include = "study.toml"\n[t]\nb = 4')
    assert read_tree(tmp_path / "top.toml", "big").values == {"x": 2, "t": {"a": 1, "b": 4}}


def test_damaged_files(tmp_path):
    write(tmp_path, a='include = "b.toml"', b='include = "a.toml"', bad="x = 1\ny = \n", none='x = 1\ninclude = "no.toml"')
    for name, message in (
        ("a", r"b.toml:1: include: a.toml includes this file"),
        ("bad", r"bad.toml:2: no TOML"),
        ("none", r"none.toml:2: include: .*no.toml: no such file"),
        ("missing", r"missing.toml: can't be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_tree(tmp_path / f"{name}.toml")


def test_kinds_of_values(tmp_path):
    write(tmp_path, study='a = 1\nb = true\nc = "x"\nd = [1, 1]\ne = [1, "x"]\nf = 2.5')
    tree = read_tree(tmp_path / "study.toml")
    table = Table(tree, (), dict(tree.values))
    assert table.take("a", float) == 1.0 and isinstance(table.take("a", float, 2.0), float)
    for take, message in (
        (lambda: table.take("b", int), ":2: b: is True, must be a whole number"),
        (lambda: table.take("c", list), ":3: c: is 'x', must be a list"),
        (lambda: table.take_list("d", int), ":4: d: is empty or has an entry twice"),
        (lambda: table.take_list("e", int), ":5: e: has 'x', must be a list of whole numbers"),
        (lambda: table.take("g", str), ":1: g: is missing; it is a text"),
        (table.finish, ":6: f: unknown key; there are a, b, c, d, e, g"),
    ):
        with pytest.raises(InputError, match=message):
            take()
