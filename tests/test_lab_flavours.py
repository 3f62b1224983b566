"""Fragments, and the check that no requested option is lost in silence."""

import pytest

from kvmgmem.errors import HarnessError
from kvmgmem.lab.kernel.flavours import (
    Option,
    compare,
    config_hash,
    flavour_names,
    load_flavour,
    overlay,
    parse_config,
    parse_fragment,
)


@pytest.mark.parametrize("name", flavour_names())
def test_every_flavour_of_the_package_can_be_read(name: str) -> None:
    """Each shipped fragment parses, names itself in the kernel's release, and keeps what the contract rests on."""
    options = {option.name: option.value for option in load_flavour(name).options}
    assert options["CONFIG_LOCALVERSION"] == f'"-kvmgmem-{name}"'
    for wanted in ("KVM_AMD", "KVM_INTEL", "KVM_SW_PROTECTED_VM", "KVM_SMM", "MEMORY_FAILURE", "X86_MCE", "DEBUG_FS"):
        assert options[f"CONFIG_{wanted}"] == "y", wanted


def test_the_flavours_are_the_three_promised_ones() -> None:
    """The command line's choices come from the package's data."""
    assert flavour_names() == ["base", "coverage", "debug"]


def test_two_flavours_never_share_a_cache_key() -> None:
    """The digest tells flavours apart, and is stable for one."""
    digests = {load_flavour(name).digest for name in flavour_names()}
    assert len(digests) == len(flavour_names())
    assert load_flavour("base").digest == load_flavour("base").digest


def test_an_unknown_flavour_is_refused_with_the_known_ones() -> None:
    """The hint lists what there is."""
    with pytest.raises(HarnessError, match="'fast'") as caught:
        load_flavour("fast")
    assert "base, coverage, debug" in caught.value.hint


def test_an_exception_holds_until_the_next_blank_line() -> None:
    """`since` and `until` comments excuse their own group only."""
    text = """
CONFIG_A=y

# since 6.17: newer
CONFIG_B=y
CONFIG_C="text"

# until 7.3: went away
# a comment in between changes nothing
CONFIG_D=n

CONFIG_E=16
"""
    assert parse_fragment(text, "t") == (
        Option("CONFIG_A", "y"),
        Option("CONFIG_B", "y", since=(6, 17)),
        Option("CONFIG_C", '"text"', since=(6, 17)),
        Option("CONFIG_D", "n", until=(7, 3)),
        Option("CONFIG_E", "16"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CONFIG_A=y\nKVM=y\n", "t.config:2: not an option: KVM=y"),
        ("CONFIG_A\n", "t.config:1: not an option"),
        ("CONFIG_A=\n", "t.config:1: not an option"),
        ("CONFIG_A=y\n\nCONFIG_A=n\n", "t.config:3: CONFIG_A is requested twice"),
    ],
)
def test_a_bad_line_is_named(text: str, message: str) -> None:
    """A typo in a fragment is found when it is read, with its line."""
    with pytest.raises(HarnessError, match=message):
        parse_fragment(text, "t")


def test_a_later_fragment_overrides_an_earlier_one() -> None:
    """merge_config.sh must see each option once, with the value of the upper fragment."""
    merged = overlay(parse_fragment("CONFIG_A=y\nCONFIG_B=y\n", "b"), parse_fragment("CONFIG_A=n\n", "d"))
    assert merged == (Option("CONFIG_B", "y"), Option("CONFIG_A", "n"))


def test_a_lost_option_is_found_whatever_way_it_was_lost() -> None:
    """Off, another value, and not even mentioned: all of these are lost; "n" and absent are the same answer."""
    options = parse_fragment("CONFIG_A=y\nCONFIG_B=16\nCONFIG_C=y\nCONFIG_D=n\nCONFIG_E=y\nCONFIG_F=n\n", "t")
    config = parse_config("# CONFIG_A is not set\nCONFIG_B=8\nCONFIG_E=y\nCONFIG_F=y\n")
    comparison = compare(options, config, (7, 3))
    assert [str(lost) for lost in comparison.lost] == [
        "CONFIG_A=y (is n)",
        "CONFIG_B=16 (is 8)",
        "CONFIG_C=y (is absent)",
        "CONFIG_F=n (is y)",
    ]
    assert comparison.excused == ()


@pytest.mark.parametrize(
    ("version", "lost", "excused"),
    [
        ((6, 12), ["CONFIG_OLD"], ["CONFIG_NEW"]),
        ((6, 17), ["CONFIG_NEW", "CONFIG_OLD"], []),
        ((7, 2), ["CONFIG_NEW", "CONFIG_OLD"], []),
        ((7, 3), ["CONFIG_NEW"], ["CONFIG_OLD"]),
        ((10, 0), ["CONFIG_NEW"], ["CONFIG_OLD"]),
    ],
)
def test_an_exception_excuses_only_the_kernels_it_names(
    version: tuple[int, int], lost: list[str], excused: list[str]
) -> None:
    """The first release with a `since` option must have it; from the `until` release on it may be gone."""
    options = parse_fragment("# since 6.17: n\nCONFIG_NEW=y\n\n# until 7.3: o\nCONFIG_OLD=y\n", "t")
    comparison = compare(options, {}, version)
    assert [difference.option.name for difference in comparison.lost] == lost
    assert [difference.option.name for difference in comparison.excused] == excused


def test_an_excused_option_that_is_there_is_not_reported() -> None:
    """Distributions backport: what an old kernel has, it has."""
    options = parse_fragment("# since 6.17: n\nCONFIG_NEW=y\n", "t")
    comparison = compare(options, {"CONFIG_NEW": "y"}, (6, 12))
    assert comparison.lost == comparison.excused == ()


def test_a_configuration_hash_changes_with_any_line() -> None:
    """The hash names a whole configuration."""
    assert config_hash("CONFIG_A=y\n") != config_hash("CONFIG_A=m\n")
    assert config_hash("CONFIG_A=y\n") == config_hash("CONFIG_A=y\n")
    assert len(config_hash("")) == 12
