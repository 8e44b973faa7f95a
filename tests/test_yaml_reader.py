"""YAML is read as people write it, with a line for every key."""

import math

import pytest

from hymba_tune.errors import UserError
from hymba_tune.yaml_reader import line_of, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("1e6", 1e6),
        ("+2.5E+3", 2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("-3", -3),
        ("010", 10),
        (".inf", math.inf),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("'5'", "5"),
        ("true", True),
        ("~", None),
    ],
)
def test_scalars_mean_what_people_write(text, value):
    read, _ = parse_yaml(f"a: {text}", "f.yaml")
    assert read == {"a": value}
    assert type(read["a"]) is type(value)


def test_every_key_and_item_has_its_line(tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text("a:\n  b: 1\n  c:\n    - x\n    - y: 2\n")
    data, lines = read_yaml(file)
    assert data == {"a": {"b": 1, "c": ["x", {"y": 2}]}}
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5, ("a", "c", 1, "y"): 5}
    assert line_of(lines, ("a", "c", 1, "unknown")) == 5
    assert line_of(lines, ("nowhere",)) == 1


def test_merged_keys_keep_the_line_where_they_were_written():
    data, lines = parse_yaml("base: &b\n  x: 1\n  y: 1\nuse:\n  <<: *b\n  y: 2\n", "f.yaml")
    assert data["use"] == {"x": 1, "y": 2}
    assert lines[("use", "x")] == 2
    assert lines[("use", "y")] == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "f.yaml:4: key 'c' is already given in line 3"),
        ("", "f.yaml:1: the file must be a mapping"),
        ("- 1", "f.yaml:1: the file must be a mapping"),
        ("a: [1\nb: 2", "f.yaml:2: not valid YAML"),
        ("a: &a [*a]", "f.yaml:1: an anchor"),
        ("? [1]\n: 2", "f.yaml:1: a key must be a plain word"),
        ("a: !!python/object:os.x 1", "f.yaml:1: not valid YAML"),
        ("a: !!int x", "f.yaml: not valid YAML"),
        ("a: \x01", "f.yaml: not valid YAML"),
    ],
)
def test_broken_files_are_refused_with_file_and_line(text, message):
    with pytest.raises(UserError) as refused:
        parse_yaml(text, "f.yaml")
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read \(No such file"):
        read_yaml(tmp_path / "none.yaml")
