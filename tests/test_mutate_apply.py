"""Mutants: finding the place in a source file, and refusing to guess."""

import pytest

from kvmgmem.mutate.apply import Applied, DoesNotApply, apply_mutant, definitions
from kvmgmem.mutate.catalogue import Mutant

SOURCE = """\
/* A file in the kernel's style. */
#include <linux/kvm.h>

static int helper(struct kvm *kvm, int size);

static int other(int size)
{
\tif (size <= 0)
\t\treturn -EINVAL;
\treturn helper(NULL, size);
}

/*
 * The helper: if (size <= 0) is only talked about here.
 */
static int helper(struct kvm *kvm,
\t\t  int size)
{
\t/* if (size <= 0) */
\tif (size <= 0)
\t\treturn -EINVAL;

\tif (kvm &&
\t    size > 9)
\t\treturn -E2BIG;
\treturn size > 9 ? 9 : size;
}

static const struct operations helper_ops = {
\t.open\t= other,
\t.help\t= helper,
};

#ifdef CONFIG_A
void twice(void)
{
\tonly_in_a();
}
#else
void twice(void)
{
\tonly_in_b();
}
#endif
"""


def mutant(find: str, put: str = "PUT", function: str = "helper") -> Mutant:
    return Mutant("m", "a.c", function, "dropped check", find, put, ("GM-CRE-001",), ("test_a",))


def applied(find: str, put: str = "PUT", function: str = "helper") -> Applied:
    answer = apply_mutant(SOURCE, mutant(find, put, function))
    assert isinstance(answer, Applied), answer
    return answer


def refusal(find: str, function: str = "helper") -> str:
    answer = apply_mutant(SOURCE, mutant(find, function=function))
    assert isinstance(answer, DoesNotApply)
    return answer.reason


def test_only_the_named_function_is_changed() -> None:
    """The same text stands in another function, in a comment before it and in one within it; none of them is touched."""
    answer = applied("if (size <= 0) return -EINVAL;", ";")
    assert answer.text.count("if (size <= 0)") == SOURCE.count("if (size <= 0)") - 1
    assert answer.text.startswith(SOURCE[: SOURCE.index("\t/* if (size <= 0) */")])
    assert answer.line == SOURCE[: SOURCE.index("*/\n\tif (size <= 0)")].count("\n") + 2


def test_comments_hold_no_place() -> None:
    """The text stands in a comment of the function too; only the code counts."""
    answer = applied("if (size <= 0)", "if (0)")
    assert "/* if (size <= 0) */\n\tif (0)\n" in answer.text


def test_white_space_of_any_length_matches() -> None:
    """A catalogue need not repeat how a kernel breaks its lines; what is put in stands as it is."""
    answer = applied("if (kvm && size > 9)", "if  (0)")
    assert "\tif  (0)\n\t\treturn -E2BIG;" in answer.text
    assert answer.text.replace("if  (0)", "if (kvm &&\n\t    size > 9)") == SOURCE


def test_a_text_that_stands_twice_is_refused() -> None:
    """Which of two places was meant would be a guess."""
    assert refusal("size > 9") == "helper has changed: what the mutant replaces is there 2 times"


def test_a_text_that_is_gone_is_refused() -> None:
    assert refusal("if (size < 0)") == "helper has changed: what the mutant replaces is not there"


def test_a_function_that_is_gone_is_refused() -> None:
    assert refusal("if (size <= 0)", "helpful") == "there is no helpful"


def test_initialised_objects_can_be_changed() -> None:
    """Tables of operations are named like functions."""
    assert "\t.help	= other,\n" in applied(".help = helper,", ".help	= other,", "helper_ops").text


def test_a_function_of_two_configurations_is_searched_in_both() -> None:
    """One of two definitions holds the text: that one is meant."""
    assert "\tPUT\n}\n#endif" in applied("only_in_b();", function="twice").text


@pytest.mark.parametrize(
    ("name", "count"),
    [("helper", 1), ("other", 1), ("helper_ops", 1), ("twice", 2), ("operations", 0), ("EINVAL", 0)],
)
def test_only_definitions_count(name: str, count: int) -> None:
    """A declaration, a use and the name of a type are no definitions."""
    found = list(definitions(SOURCE, name))
    assert len(found) == count
    assert all(SOURCE[end - 1] == "}" for _, end in found)
