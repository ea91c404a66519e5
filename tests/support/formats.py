"""A problem in each format that `shards.problems` reads, and a right and a wrong body of its function."""

from typing import Any

HUMANEVAL: dict[str, Any] = {
    "task_id": "HumanEval/0",
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
HUMANEVAL_PLUS: dict[str, Any] = {  # EvalPlus' own file
    **{name: value for name, value in HUMANEVAL.items() if name != "test"},
    "contract": "",
    "base_input": [[2]],
    "plus_input": [[0], [[1.5, "a"]]],
    "atol": 0,
}
INFILLING: dict[str, Any] = {
    **HUMANEVAL,
    "task_id": "SingleLineInfilling/HumanEval/0/L0",
    "canonical_solution": "    doubled = 2 * x\n",
    "suffix": "    return doubled\n",
}
MBPP: dict[str, Any] = {
    "task_id": 7,
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n\treturn 2 * x\r\n",
    "test_setup_code": "two = 2",
    "test_list": ["assert double(two) == 4", "assert double(3) == 6"],
    "challenge_test_list": [],
}
MBPP_PLUS = {**MBPP, "prompt": MBPP["text"], "test": "for n in (2, 3):\n    assert double(n) == 2 * n"}
MULTIPL_E: dict[str, Any] = {
    "name": "HumanEval_0_double",
    "language": "py",
    "prompt": "def double(x: int) -> int:\n",
    "tests": f"{HUMANEVAL['test']}\ndef test_check():\n    check(double)\n\ntest_check()\n",
    "stop_tokens": ["\ndef", "\n#"],
}
APPS: dict[str, Any] = {
    "problem_id": 9,
    "question": "Read a number and print its double.",
    "solutions": '["print(2 * int(input()))\\n", "n = int(input())\\nprint(n + n)\\n"]',
    "input_output": '{"inputs": ["2\\n"], "outputs": ["4\\n"]}',
    "difficulty": "introductory",
    "starter_code": "",
}
RIGHT, WRONG = "    return 2 * x\n", "    return x\n"
