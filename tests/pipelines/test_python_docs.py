import os
import sysconfig

import pyarrow.parquet as pq
import pytest

from pipelines import python_docs
from pipelines.python_docs import documentation_strings, list_source_files, parse_group
from pipelines.sources import documented_packages
from pipelines.store import OutputFolder

LONG = "This sentence is long enough to be taken for documentation."


def strings_of(tmp_path, source):
    file = tmp_path / "module.py"
    file.write_bytes(source if isinstance(source, bytes) else source.encode())
    return documentation_strings(file)


def test_modules_classes_and_functions_are_read_in_the_order_of_the_tree(tmp_path):
    source = f'''"""Module. {LONG}"""
def function():
    """Function. {LONG}

        Indented. naïve 試験
    Not indented.
    """
    async def inner():
        \'\'\'Inner. {LONG}\'\'\'
class Class:
    "Class. {LONG}"
    text = """No documentation. {LONG}"""
    def method(self):
        """short"""
'''
    found = strings_of(tmp_path, source)
    assert [text.split(".")[0] for text in found] == ["Module", "Function", "Class", "Inner"]
    assert found[1] == f"Function. {LONG}\n\n    Indented. naïve 試験\nNot indented."


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"x = 1\n",
        b'"""unfinished ' + LONG.encode(),
        b'"""' + LONG.encode() + b'"""\nthis is no Python\n',
        b'"""' + LONG.encode() + b'"""\nprint "Python 2"\n',
        b'"""\xff\xfe ' + LONG.encode() + b'"""\n',
        b'# coding: nonsense\n"""' + LONG.encode() + b'"""\n',
        b'"""' + LONG.encode() + b'"""\n\x00\n',
        b'"""' + LONG.encode() + b'"""\nx = ' + b"(" * 5000 + b")" * 5000,
        b'"""' + LONG.encode() + b'"""\nx = ' + b"-" * 100_000 + b"1",
    ],
    ids=["empty", "none", "open", "syntax", "python2", "bytes", "coding", "null", "nested", "deep"],
)
def test_files_that_do_not_parse_have_none(tmp_path, source):
    assert strings_of(tmp_path, source) == []


def test_other_encodings_and_marks_are_read(tmp_path):
    assert strings_of(tmp_path, b"\xef\xbb\xbf" + f'"""{LONG}"""'.encode()) == [LONG]
    latin = f'# -*- coding: latin-1 -*-\n"""Café. {LONG}"""'.encode("latin-1")
    assert strings_of(tmp_path, latin) == [f"Café. {LONG}"]


def test_lone_surrogates_and_wrong_escapes_are_no_harm(tmp_path, recwarn):
    assert strings_of(tmp_path, f'"""Half \\ud83d. {LONG}"""') == [f"Half . {LONG}"]
    assert strings_of(tmp_path, f'"""A path \\d. {LONG}"""') == [f"A path \\d. {LONG}"]
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, SyntaxWarning)] == []


def test_a_file_that_is_gone_is_a_fault_and_not_a_smaller_corpus(tmp_path):
    with pytest.raises(FileNotFoundError):
        documentation_strings(tmp_path / "nope.py")


def test_source_files_come_in_an_order_of_their_names_alone():
    packages = {name: version for name, version in documented_packages().items() if name in ("click", "numpy")}
    files = list_source_files(packages)
    assert files == list_source_files(dict(reversed(packages.items())))
    names = [name for name, _, _ in files]
    assert len(set(names)) == len(names) > 900
    assert {name.partition("/")[0] for name in names} == {"python", "click", "numpy"}
    assert {name.partition("/")[0] for name in names[:60]} >= {"python", "numpy"}, "a fair mixture"
    assert all(os.path.isfile(path) and size == os.path.getsize(path) for _, path, size in files)
    library = sysconfig.get_path("stdlib")
    assert ("python/json/decoder.py", f"{library}/json/decoder.py") in [file[:2] for file in files]
    assert not [name for name in names if name.startswith("python/test/") or "site-packages" in name]


def parsed(tmp_path, groups):
    """Parse groups of sources as the tasks do, and return the output with the names of what they wrote."""
    output = OutputFolder(str(tmp_path / "corpus-0123456789ab"))
    names = []
    for number, group in enumerate(groups):
        files = []
        for name, strings in group.items():
            file = tmp_path / name.replace("/", "_")
            functions = (f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(strings))
            file.write_text("".join(functions))
            files.append((name, str(file)))
        names.append(f"parsed/group-{number}.parquet")
        task = {"folder": output.to_task(), "name": names[-1], "files": files}
        assert parse_group(task) == {"strings": sum(map(len, group.values()))}
    return output, names


def documents(output, names):
    rows = [row for name in names for row in pq.read_table(output.local(name)).to_pylist()]
    return {row["id"]: row["text"] for row in rows}


def test_repeated_strings_stay_in_the_first_file_only(tmp_path):
    groups = [
        {"a/one.py": [f"One. {LONG}", f"Both. {LONG}"], "a/two.py": [f"Both. {LONG}"]},
        {"b/three.py": [f"Both. {LONG}", f"Three. {LONG}"], "b/none.py": []},
    ]
    output, names = parsed(tmp_path, groups)
    shards = python_docs._write_shards(names, 10_000, output)
    assert len(shards) == 16
    assert documents(output, shards) == {
        "a/one.py": f"One. {LONG}\n\nBoth. {LONG}",
        "b/three.py": f"Three. {LONG}",
    }


def test_the_corpus_ends_at_its_bound(tmp_path):
    groups = [{f"{i:03}.py": [f"{i:03}. {LONG}"]} for i in range(100)]
    output, names = parsed(tmp_path, groups)
    size = len(f"000. {LONG}") + 2
    shards = python_docs._write_shards(names, 10 * size, output)
    assert sorted(documents(output, shards)) == [f"{i:03}.py" for i in range(10)]
    rows = [pq.read_metadata(output.local(name)).num_rows for name in shards]
    assert sum(rows) == 10
    assert max(rows) == 1, "equal parts"


def test_shards_are_the_same_bytes_every_time(tmp_path):
    groups = [{f"{i:03}.py": [f"{i:03}. {LONG}", LONG * 3]} for i in range(40)]
    output, names = parsed(tmp_path, groups)
    first = {name: output.read_bytes(name) for name in python_docs._write_shards(names, 10_000, output)}
    again = {name: output.read_bytes(name) for name in python_docs._write_shards(names, 10_000, output)}
    assert first == again
    assert len(set(first.values())) == 16
