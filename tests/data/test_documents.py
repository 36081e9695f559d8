"""Documents from files, conversations and tasks: what is read, which tokens carry loss, and what a bad row is told."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from luciola.data.documents import Conversations, Document, TaskDocuments, TextDocuments, read_texts
from luciola.tasks.arithmetic import Arithmetic
from luciola.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.characters("".join(map(chr, range(32, 127))) + "\n")
EOS = TOKENIZER.decode([TOKENIZER.eos_token_ids[0]], skip_special_tokens=False)


def trained_text(document: Document) -> str:
    ids = [t for t, trained in zip(document.tokens, document.trained, strict=True) if trained]
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_texts_come_from_files_rows_and_folders_in_order(tmp_path: Path) -> None:
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    (tmp_path / "folder" / "b.txt").write_text("second")
    (tmp_path / "folder" / "a.md").write_text("first")
    (tmp_path / "folder" / "deeper" / "c.txt").write_text("third")
    (tmp_path / "folder" / "picture.png").write_bytes(b"\x89PNG")
    rows = jsonl(tmp_path / "rows.jsonl", {"text": "fourth"}, {"text": "fifth", "id": 3})
    assert list(read_texts([str(tmp_path / "folder"), rows], "text")) == ["first", "second", "third", "fourth", "fifth"]


def test_a_text_ends_with_the_end_token_and_all_of_it_is_trained(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    documents = TextDocuments([str(tmp_path / "a.txt")], "text", TOKENIZER)
    assert documents.size == 1
    assert trained_text(documents.document(0)) == "abc" + EOS


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', r"rows.jsonl row 2 is not JSON"),
        (b'{"text": "a"}\n\n[1]\n', r"rows.jsonl row 3 is not a JSON object"),
        (b'{"text": "a"}\n{"content": "b", "id": 1}\n', r"row 2 has no text in field 'text'; its fields: content, id"),
        (b'{"text": 7}\n', r"rows.jsonl row 1 has no text in field 'text'"),
        (b'{"text": ""}\n', r"rows.jsonl row 1 has no text in field 'text'"),
        (b"\n\n", r"rows.jsonl is empty"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"rows.jsonl row 2 is not UTF-8 text"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        list(read_texts([str(tmp_path / "rows.jsonl")], "text"))


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "nothing").mkdir()
    for name, complaint in [
        ("empty.txt", "empty.txt is empty"),
        ("latin.txt", r"latin.txt is not UTF-8 text \(byte 1\)"),
        ("nothing", r"nothing holds no .txt, .md or .jsonl file"),
        ("missing.txt", r"missing.txt does not exist; check data.paths"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            list(read_texts([str(tmp_path / name)], "text"))


def messages(*turns: str) -> dict[str, Any]:
    """Turns "role: content"."""
    return {"messages": [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]}


def conversation(tmp_path: Path, *turns: str) -> Document:
    path = jsonl(tmp_path / "chats.jsonl", messages(*turns))
    return Conversations([path], TOKENIZER, "messages").document(0)


def test_only_what_the_assistant_says_is_trained(tmp_path: Path) -> None:
    document = conversation(
        tmp_path, "system: Be kind.", "user: Hi", "assistant: Hello", "user: Bye", "assistant: Ciao"
    )
    assert trained_text(document) == f"Hello{EOS}Ciao{EOS}"
    text = TOKENIZER.decode(document.tokens)
    assert text == "Be kind.HiHelloByeCiao"


def test_what_follows_the_last_answer_is_left_out(tmp_path: Path) -> None:
    document = conversation(tmp_path, "user: Hi", "assistant: Hello", "user: and now?")
    assert TOKENIZER.decode(document.tokens) == "HiHello"


def test_thinking_that_the_template_drops_from_the_history_is_not_trained_on_a_false_prompt(tmp_path: Path) -> None:
    """The last answer is rendered as it will be at inference; turns that stand there differently carry no loss."""
    turns = ["user: 1+1", "assistant: <think>hm</think>2", "user: 2+2", "assistant: <think>so</think>4"]
    document = conversation(tmp_path, *turns)
    prompt = messages(*turns[:3])["messages"]
    assert document.tokens[: len(TOKENIZER.chat(prompt))] == TOKENIZER.chat(prompt)
    assert trained_text(document) == f"<think>so</think>4{EOS}"


def test_prompt_and_completion_fields(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", {"question": "1+1", "reply": "2"})
    document = Conversations([path], TOKENIZER, "messages", "question", "reply").document(0)
    asked = [{"role": "user", "content": "1+1"}]
    assert document.tokens == [*TOKENIZER.chat(asked), *TOKENIZER.encode("2"), TOKENIZER.eos_token_ids[0]]
    assert trained_text(document) == "2" + EOS


@pytest.mark.parametrize(
    "row",
    [{}, {"messages": []}, {"messages": "hi"}, {"messages": [{"role": "user"}]}, messages("user: Hi")],
    ids=["no field", "empty", "text", "no content", "no assistant"],
)
def test_a_conversation_without_an_answer_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    path = jsonl(tmp_path / "chats.jsonl", messages("user: a", "assistant: b"), row)
    with pytest.raises(ValueError, match=r"chats.jsonl row 2: field 'messages' must be a list of messages"):
        Conversations([path], TOKENIZER, "messages")


def test_a_missing_pair_field_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", {"question": "1+1", "answer": "2"})
    with pytest.raises(
        ValueError, match=r"pairs.jsonl row 1 has no text in field 'reply'; its fields: answer, question"
    ):
        Conversations([path], TOKENIZER, "messages", "question", "reply")


def test_a_tasks_documents_depend_on_seed_and_number_alone() -> None:
    def documents(seed: int) -> TaskDocuments:
        return TaskDocuments(Arithmetic(), TOKENIZER, seed, error_rate=0.3)

    backwards = [documents(0).document(i) for i in reversed(range(20))]
    assert backwards[::-1] == [documents(0).document(i) for i in range(20)]
    assert backwards != [documents(1).document(i) for i in range(20)]


def test_a_tasks_document_is_prompt_and_solution() -> None:
    task = Arithmetic()
    problem = task.problem("train", 5, 0)
    solution = task.solution(problem, random.Random("0/5/solution"))
    whole = TaskDocuments(task, TOKENIZER, 0).document(5)
    assert TOKENIZER.decode(whole.tokens) == problem.prompt + solution
    assert all(whole.trained)
    answer = TaskDocuments(task, TOKENIZER, 0, completion_only=True).document(5)
    assert answer.tokens == whole.tokens
    assert trained_text(answer) == solution + EOS
