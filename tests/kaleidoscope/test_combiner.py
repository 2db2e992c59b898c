"""The combiner against brute force: every question about a space has the answer that listing everything gives."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from kaleidoscope import combiner
from kaleidoscope.combiner import (
    Constraint,
    Forbidden,
    MatchTerm,
    MaterialTerm,
    Option,
    Slot,
    Space,
    TagTerm,
    Term,
    as_batch,
    broken_rules,
    count,
    diagnose,
    explode,
    is_legal,
    pair_support,
    parse,
    positions_of,
    sample,
    schema,
    tag_columns,
    tags_of,
    variant_id,
    work_limit,
)
from kaleidoscope.coverage import cover
from kaleidoscope.errors import InputError, TooComplexError
from kaleidoscope.vocabulary import Level

# ── brute force: the meaning of constraints, written down a second time ──


def holds(term: Term, variant: dict[str, Option]) -> bool:
    if isinstance(term, MaterialTerm):
        return variant[term.slot].id in term.ids
    if isinstance(term, MatchTerm):
        (a, d), (b, e) = term.first, term.second
        return bool(set(variant[a].tags.get(d, ())) & set(variant[b].tags.get(e, ())))
    shown = variant.values() if term.slot is None else [variant[term.slot]]
    carried = {v for option in shown for v in option.tags.get(term.dimension, ())}
    return bool(carried & set(term.values) if term.values else carried)


def broken(constraint: Constraint, variant: dict[str, Option]) -> bool:
    if constraint.kind == "forbid":
        return all(holds(term, variant) for term in constraint.terms)
    return all(holds(t, variant) for t in constraint.when) and not all(holds(t, variant) for t in constraint.terms)


def forbidden(pairs: Forbidden, space: Space, indices: tuple[int, ...]) -> bool:
    names = [slot.name for slot in space.slots]
    return bool(pairs.table[indices[names.index(pairs.first)], indices[names.index(pairs.second)]])


def listed(space: Space, *, without: Constraint | Forbidden | None = None) -> list[tuple[int, ...]]:
    """Return every legal combination in order; `without` leaves out one rule."""
    legal = []
    for indices in itertools.product(*(range(n) for n in space.sizes)):
        variant = {slot.name: slot.options[i] for slot, i in zip(space.slots, indices, strict=True)}
        if not any(broken(c, variant) for c in space.constraints if c is not without) and not any(
            forbidden(f, space, indices) for f in space.forbidden if f is not without
        ):
            legal.append(indices)
    return legal


def materials_of(space: Space, indices: tuple[int, ...]) -> dict[str, str]:
    return {slot.name: slot.options[i].id for slot, i in zip(space.slots, indices, strict=True)}


def rows_of(space: Space, batches: Iterator[pa.RecordBatch]) -> list[tuple[int, ...]]:
    table = pa.Table.from_batches(batches, schema=schema(space)).combine_chunks()
    columns = [
        [positions[m] for m in table.column(slot.name).to_pylist()]
        for slot, positions in zip(space.slots, space.positions, strict=True)
    ]
    return list(zip(*columns, strict=True))


# ── random spaces ──

DIMENSIONS = ("colour", "tone", "benefit")
VALUES = ("red", "blue", "of two words", "with")


def random_space(rng: np.random.Generator, *, most: int = 6, forbid_bias: float = 0.6) -> Space:
    slots = []
    for s in range(rng.integers(1, 6)):
        options = tuple(Option(f"m{s}.{i}", random_tags(rng)) for i in range(rng.integers(1, most + 1)))
        slots.append(Slot(f"slot {s}", options))
    constraints = tuple(random_constraint(rng, slots, forbid_bias) for _ in range(rng.integers(0, 6)))
    tables = []
    if len(slots) > 1 and rng.random() < 0.5:
        a, b = rng.choice(len(slots), 2, replace=False)
        table = rng.random((len(slots[a].options), len(slots[b].options))) < 0.3
        tables.append(Forbidden(slots[a].name, slots[b].name, table, "contrast"))
    return Space(tuple(slots), constraints, tuple(tables))


def random_tags(rng: np.random.Generator) -> dict[str, tuple[str, ...]]:
    return {
        d: tuple(rng.choice(VALUES, rng.integers(1, 3), replace=False).tolist())
        for d in DIMENSIONS
        if rng.random() < 0.7
    }


def random_constraint(rng: np.random.Generator, slots: list[Slot], forbid_bias: float) -> Constraint:
    def term() -> Term:
        slot = slots[rng.integers(len(slots))]
        dimension = DIMENSIONS[rng.integers(len(DIMENSIONS))]
        match rng.integers(4):
            case 0:
                ids = rng.choice([o.id for o in slot.options], rng.integers(1, min(3, len(slot.options)) + 1), False)
                return MaterialTerm(slot.name, tuple(ids.tolist()))
            case 1:
                other = slots[rng.integers(len(slots))]
                return MatchTerm((slot.name, dimension), (other.name, DIMENSIONS[rng.integers(len(DIMENSIONS))]))
            case _:
                values = tuple(rng.choice(VALUES, rng.integers(0, 3), replace=False).tolist())
                return TagTerm(slot.name if rng.random() < 0.6 else None, dimension, values)

    if rng.random() < forbid_bias:
        return Constraint("forbid", tuple(term() for _ in range(rng.integers(1, 5))))
    return Constraint(
        "require",
        tuple(term() for _ in range(rng.integers(1, 3))),
        tuple(term() for _ in range(rng.integers(0 if rng.random() < 0.3 else 1, 4))),
    )


def check_everything(space: Space, batch_rows: int) -> None:
    """Assert that exploding, counting, pairs, legality and ids agree with brute force."""
    legal = listed(space)
    batches = list(explode(space, batch_rows))
    assert rows_of(space, iter(batches)) == legal
    assert all(b.num_rows == batch_rows for b in batches[:-1])
    for batch in batches:
        batch.validate(full=True)
    assert count(space) == len(legal)
    everything = np.array(list(itertools.product(*(range(n) for n in space.sizes))))
    assert [tuple(row) for row in everything[is_legal(space, everything)].tolist()] == legal
    ids = [i for batch in batches for i in batch.column("variant_id").to_pylist()]
    assert len(set(ids)) == len(ids)
    for indices, id in list(zip(legal, ids, strict=True))[:: max(1, len(legal) // 20)]:
        assert id == variant_id(dict(reversed(materials_of(space, indices).items())))
    for (i, j), support in pair_support(space).items():
        truth = np.zeros_like(support)
        for indices in legal:
            truth[indices[i], indices[j]] = True
        assert (support == truth).all()


# ── properties ──


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), batch_rows=st.sampled_from([1, 3, 17, 1000]))
def test_agrees_with_listing_everything(seed: int, batch_rows: int) -> None:
    check_everything(random_space(np.random.default_rng(seed), most=4), batch_rows)


def test_agrees_with_listing_everything_over_a_hundred_thousand_combinations() -> None:
    rng = np.random.default_rng(7)
    combinations = legal = 0
    while combinations < 100_000:
        space = random_space(rng, most=9)
        size = int(np.prod(space.sizes))
        if size < 10_000:
            check_everything(space, int(rng.integers(1, 500)))
            combinations, legal = combinations + size, legal + count(space)
    assert 0.05 < legal / combinations < 0.95


@pytest.mark.parametrize("largest", [1, 8, 64])
def test_counts_and_draws_alike_when_tables_are_too_large(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    monkeypatch.setattr(combiner, "LARGEST_TABLE", largest)
    monkeypatch.setattr(combiner, "LARGEST_LOOKAHEAD", largest)
    rng = np.random.default_rng(largest)
    for _ in range(25):
        space = random_space(rng, most=4)
        check_everything(space, 50)
        if count(space):
            assert set(rows_of(space, iter([sample(space, 20, rng)]))) <= set(listed(space))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_constraints_survive_being_written_and_read(seed: int) -> None:
    rng = np.random.default_rng(seed)
    space = random_space(rng)
    for constraint in space.constraints:
        assert parse(str(constraint), None) == constraint
        assert str(parse(str(constraint))) == str(constraint)


@given(st.text(), st.text(), st.lists(st.text(), min_size=1, unique=True))
def test_any_name_can_be_quoted(slot: str, dimension: str, values: list[str]) -> None:
    for term in (TagTerm(slot, dimension, tuple(values)), MaterialTerm(slot, tuple(values))):
        assert parse(str(Constraint("forbid", (term,)))).terms == (term,)


@given(st.text(alphabet="forbidwthequ .:=|,*\"'\\x-", max_size=40))
def test_nonsense_is_an_input_error_and_never_anything_else(text: str) -> None:
    try:
        parsed = parse(text)
    except InputError:
        return
    assert parse(str(parsed)) == parsed


# ── the grammar ──

SLOTS = (
    Slot("copy", (Option("c1", {"benefit": ("red_packet",)}), Option("c2", {"benefit": ("cash",), "tone": ("warm",)}))),
    Slot("image", (Option("i1", {"subject": ("product",)}), Option("hero image", {"subject": ("person",)}))),
)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("forbid copy.benefit=red_packet with image.subject=product", None),
        ("forbid  copy : c1,c2|c1  with 'image' :'hero image'", 'forbid copy:c1|c2 with image:"hero image"'),
        ("forbid benefit=*", None),
        ("require copy.benefit matches image.subject when image.subject=*", None),
        ("require copy:c1 with image:i1 when tone=warm with copy.tone=warm", None),
        ('forbid copy.tone="with"', None),
        ("forbid copy.tone='\\'\"\\\\'", 'forbid copy.tone="\'\\"\\\\"'),
        ("forbid 文案.语气=温暖", None),
    ],
)
def test_expressions_have_one_canonical_form(text: str, canonical: str | None) -> None:
    assert str(parse(text)) == (canonical or text)
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("forbd copy:c1", "position 1: expected `forbid` or `require`, found `forbd`; did you mean `forbid`?"),
        ("", "position 1: expected `forbid` or `require`, found the end"),
        ("forbid copy", "position 12: expected `:` and a material, `.` and a dimension, or `=` and a value, found the"),
        ("forbid copy.benefit", "position 20: expected `=` and a value, or `matches`, found the end"),
        ("forbid copy.=x", "position 13: expected a dimension, found `=`"),
        (
            "forbid copy.tone=with image:i1",
            'position 18: expected a value or `*`, found `with`; write "with" in quotes',
        ),
        ("forbid copy:c1 when image:i1", "position 16: expected `with` or the end, found `when`"),
        ("require copy:c1 image:i1", "position 17: expected `with`, `when` or the end, found `image`"),
        ("forbid copy.benefit=10%", "position 23: '%' needs quotes"),
        ("forbid copy.benefit='cash", "position 21: this quote is never closed"),
        ("forbid cpy:c1", "position 8: no slot is called cpy; did you mean copy?"),
        ("forbid copy:c9", "position 13: slot copy has no material c9; did you mean c"),
        (
            "forbid copy.benfit=cash",
            "position 13: no material of slot copy has a dimension benfit; did you mean benefit?",
        ),
        ("forbid image.subject=persn", "position 22: image.subject has no value persn; did you mean person?"),
        ("forbid tone=wrm", "position 13: tone has no value wrm; did you mean warm?"),
        ("forbid copy=c1", "position 8: no material has a dimension copy; copy is a slot: write copy:material or"),
        ("forbid image:hero", 'position 14: slot image has no material hero; did you mean "hero image"?'),
        ("require copy.benefit matches imag.subject", "position 30: no slot is called imag; did you mean image?"),
    ],
)
def test_errors_say_where_and_what_was_expected(text: str, why: str) -> None:
    with pytest.raises(InputError) as raised:
        parse(text, SLOTS)
    assert str(raised.value).startswith(f"constraint {text!r}, {why}")


def test_a_value_of_the_taxonomy_is_known_before_any_material_carries_it() -> None:
    text = "forbid copy.benefit=coupon"
    assert parse(text, SLOTS, {"benefit": ["coupon"]}) == parse(text)
    with pytest.raises(InputError, match="no value coupon"):
        parse(text, SLOTS)


def test_what_expressions_mean() -> None:
    def left(*texts: str) -> set[tuple[str, ...]]:
        space = Space(SLOTS, tuple(parse(t, SLOTS) for t in texts))
        return {tuple(materials_of(space, row).values()) for row in rows_of(space, explode(space))}

    all_four = set(itertools.product(["c1", "c2"], ["i1", "hero image"]))
    assert left() == all_four
    assert left("forbid copy.benefit=red_packet with image.subject=product") == all_four - {("c1", "i1")}
    assert left("require image.subject=person when copy:c2") == all_four - {("c2", "i1")}
    assert left("forbid tone=*") == {("c1", "i1"), ("c1", "hero image")}
    assert left("require tone=* with subject=product") == {("c2", "i1")}
    assert left("require copy.benefit matches image.subject") == set()
    assert left("forbid copy.benefit matches image.subject") == all_four


# ── ids, tags, batches ──


def test_ids_never_change() -> None:
    assert variant_id({"copy": "c1", "image": "i1", "layout": "l1"}) == "2045940b58329860ef6fbd04"
    assert variant_id({"layout": "l1", "image": "i1", "copy": "c1"}) == "2045940b58329860ef6fbd04"
    assert variant_id({"文案": "红包 ¥5"}) == "8c0099f97a74ca28ec75a50b"
    assert variant_id({}) == "0" * 24


def test_ids_tell_slots_and_materials_apart() -> None:
    ids = {
        variant_id(m)
        for m in (
            {"a": "bc"},
            {"ab": "c"},
            {"a": "b", "c": "d"},
            {"a": "d", "c": "b"},
            {"c": "b", "b": "d"},
            {"a": "b"},
        )
    }
    assert len(ids) == 6


def test_tags_are_the_union_of_the_materials_tags() -> None:
    space = Space(
        (
            Slot("copy", (Option("c1", {"colour": ("red", "blue")}), Option("c2"))),
            Slot("image", (Option("i1", {"colour": ("blue",), "subject": ("person",)}), Option("i2"))),
        )
    )
    assert tags_of(space, {"image": "i1", "copy": "c1"}) == {"colour": ("blue", "red"), "subject": ("person",)}
    assert tags_of(space, {"image": "i2", "copy": "c2"}) == {}
    (batch,) = explode(space)
    tags = tag_columns(space, batch)
    assert tags.column("colour").to_pylist() == [["blue", "red"], ["blue", "red"], ["blue"], []]
    assert tags.column("subject").to_pylist() == [["person"], [], ["person"], []]
    for row, materials in zip(tags.to_pylist(), batch.drop_columns(["variant_id"]).to_pylist(), strict=True):
        assert {d: tuple(v) for d, v in row.items() if v} == tags_of(space, materials)


def test_batches_hold_dictionaries_and_agree_with_positions() -> None:
    space = Space(SLOTS)
    (batch,) = explode(space)
    assert batch.schema == schema(space)
    assert batch.column("copy").type == pa.dictionary(pa.int8(), pa.string())
    assert batch.equals(as_batch(space, np.array(list(itertools.product([0, 1], [0, 1])))))


def test_ten_million_combinations_hold_no_list() -> None:
    rng = np.random.default_rng(0)
    slots = tuple(Slot(f"s{s}", tuple(Option(f"m{i}", random_tags(rng)) for i in range(25))) for s in range(5))
    texts = ("forbid s0.colour=red with s4.colour=blue", "require s1.tone matches s2.tone when s2.tone=red")
    space = Space(slots, tuple(parse(t, slots) for t in texts))
    tracemalloc.start()
    rows = sum(batch.num_rows for batch in explode(space))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == count(space) > 5_000_000
    assert peak < 64 * 2**20


def test_dead_prefixes_are_not_expanded() -> None:
    # 50**6 prefixes of six slots, and the last slot allows one of each: only looking ahead finishes.
    slots = tuple(Slot(f"s{s}", tuple(Option(f"m{i}") for i in range(50))) for s in range(7))
    only_same = ~np.eye(50, dtype=np.bool_)
    space = Space(slots, (), tuple(Forbidden(f"s{s}", "s6", only_same, f"s{s} as s6") for s in range(6)))
    assert rows_of(space, explode(space)) == [(i,) * 7 for i in range(50)]


def test_variants_that_break_rules_name_them() -> None:
    space = Space(SLOTS, (parse("forbid tone=warm"), parse("forbid copy:c2 with image:i1"), parse("forbid copy:c1")))
    assert broken_rules(space, {"copy": "c2", "image": "i1"}) == ("forbid tone=warm", "forbid copy:c2 with image:i1")
    with pytest.raises(InputError, match="no material c3"):
        positions_of(space, {"copy": "c3", "image": "i1"})
    with pytest.raises(InputError, match="one material for each of copy, image"):
        broken_rules(space, {"copy": "c1"})


# ── counting and sampling ──


def test_counts_spaces_no_computer_could_list() -> None:
    slots = tuple(
        Slot(f"s{s}", tuple(Option(f"m{i}", {"colour": (f"v{i % 7}",)}) for i in range(100))) for s in range(10)
    )
    assert count(Space(slots)) == 100**10
    one_pair = Space(slots, (parse("forbid s0.colour=v0 with s9.colour=v1"),))
    assert count(one_pair) == 100**10 - 15 * 15 * 100**8
    chain = Space(slots, tuple(parse(f"require s{s}.colour matches s{s + 1}.colour") for s in range(9)))
    assert count(chain) == sum(n**10 for n in [15, 15, 14, 14, 14, 14, 14])
    somewhere = Space(slots, (parse("require colour=v0"),))
    assert count(somewhere) == 100**10 - 85**10


def test_counts_dense_random_pairs_exactly() -> None:
    rng = np.random.default_rng(3)
    slots = tuple(Slot(f"s{s}", tuple(Option(f"m{i}") for i in range(40))) for s in range(3))
    tables = {pair: rng.random((40, 40)) < 0.4 for pair in ((0, 1), (0, 2), (1, 2))}
    space = Space(slots, (), tuple(Forbidden(f"s{i}", f"s{j}", t) for (i, j), t in tables.items()))
    ok = {pair: (~t).astype(int) for pair, t in tables.items()}
    assert count(space) == int(np.einsum("ab,ac,bc->", ok[0, 1], ok[0, 2], ok[1, 2]))


def test_samples_uniformly() -> None:
    slots = tuple(
        Slot(f"s{s}", tuple(Option(f"m{i}", {"colour": (VALUES[i % 3],)}) for i in range(4))) for s in range(3)
    )
    space = Space(
        slots, (parse("forbid s0.colour=red with s1.colour=red with s2.colour=blue"), parse("forbid s0:m1 with s2:m1"))
    )
    legal = listed(space)
    drawn = rows_of(space, iter([sample(space, 20_000, np.random.default_rng(1))]))
    assert set(drawn) == set(legal)
    assert chisquare([drawn.count(row) for row in legal]).pvalue > 1e-3


# ── what is wrong with a space ──


def codes(space: Space) -> list[tuple[str, Level]]:
    return [(finding.code, finding.level) for finding in diagnose(space)]


def test_nothing_is_wrong_with_a_good_space() -> None:
    assert diagnose(Space(SLOTS, (parse("forbid copy:c1 with image:i1"),))) == ()


def test_empty_slots_and_duplicates_are_errors() -> None:
    space = Space((Slot("copy", ()), Slot("image", (Option("i1"), Option("i1")))))
    assert codes(space) == [("empty_slot", Level.ERROR), ("duplicate_material", Level.ERROR)]
    assert diagnose(space)[1].materials == ("i1",)
    assert rows_of(Space((Slot("copy", ()), SLOTS[1])), explode(Space((Slot("copy", ()), SLOTS[1])))) == []
    for ask in (count, explode, pair_support):
        with pytest.raises(InputError, match="slot image: material i1 is there twice"):
            ask(space)


def test_rules_that_do_nothing_are_named() -> None:
    idle, misspelt = "forbid copy.benefit=cash with copy:c1", "forbid image.subject=produkt"
    space = Space(SLOTS, (parse(idle), parse(misspelt)))
    found = diagnose(space)
    assert [(f.code, f.constraints) for f in found] == [
        ("unknown_name", (misspelt,)),
        ("forbids_nothing", (idle,)),
        ("forbids_nothing", (misspelt,)),
    ]
    assert "did you mean product?" in found[0].message


def test_redundant_rules_are_told() -> None:
    wide, narrow = "forbid copy:c1", "forbid copy:c1 with image:i1"
    found = diagnose(Space(SLOTS, (parse(wide), parse(narrow))))
    assert [(f.code, f.constraints) for f in found] == [("unusable_material", (wide,)), ("redundant", (narrow,))]
    twins = Space(SLOTS, (parse(narrow), parse(narrow)))
    assert codes(twins) == [("redundant", Level.INFO)] * 2


def test_a_smallest_conflict_is_named() -> None:
    texts = (
        "forbid copy:c1 with image:i1",
        "require copy:c1 when image:i1",
        "require copy:c2 when image.subject=person",
        "forbid copy:c2",
        "forbid tone=cold",
    )
    (unknown, idle, found) = sorted(
        diagnose(Space(SLOTS, tuple(map(parse, texts)))), key=lambda f: f.code == "no_legal_variant"
    )
    assert (unknown.code, idle.code) == ("unknown_name", "forbids_nothing")
    assert found.code == "no_legal_variant" and found.level is Level.ERROR
    conflict = [parse(t) for t in found.constraints]
    assert count(Space(SLOTS, tuple(conflict))) == 0
    for rule in conflict:
        assert count(Space(SLOTS, tuple(c for c in conflict if c is not rule))) > 0


def test_a_slot_left_without_material_is_named() -> None:
    (found,) = diagnose(
        Space(SLOTS, (parse("forbid copy.benefit=red_packet|cash"), parse("forbid copy:c1 with image:i1")))
    )
    assert (found.code, found.slot, found.constraints) == (
        "no_legal_variant",
        "copy",
        ("forbid copy.benefit=red_packet|cash",),
    )


def test_unusable_materials_are_named_with_what_rules_them_out() -> None:
    table = np.array([[True, False], [False, False]])
    texts = ("forbid copy:c1 with image.subject=person", "require copy.benefit=red_packet|cash")
    space = Space(SLOTS, tuple(map(parse, texts)), (Forbidden("copy", "image", table, "contrast"),))
    found = [f for f in diagnose(space) if f.code == "unusable_material"]
    assert [(f.slot, f.materials, f.constraints) for f in found] == [("copy", ("c1",), (texts[0], "contrast"))]


def test_findings_agree_with_brute_force() -> None:
    rng = np.random.default_rng(11)
    for _ in range(150):
        space = random_space(rng, most=4)
        if any(not slot.options for slot in space.slots):
            continue
        found = diagnose(space)
        legal = listed(space)
        assert any(f.code == "no_legal_variant" for f in found) == (not legal)
        rules = [*space.constraints, *space.forbidden]
        texts = [str(c) for c in space.constraints] + [f.name for f in space.forbidden]
        alone = [
            Space(
                space.slots,
                tuple(r for r in [rule] if isinstance(r, Constraint)),
                tuple(r for r in [rule] if isinstance(r, Forbidden)),
            )
            for rule in rules
        ]
        idle = {t for t, s in zip(texts, alone, strict=True) if len(listed(s)) == np.prod(space.sizes)}
        assert {f.constraints[0] for f in found if f.code == "forbids_nothing"} == idle
        if legal:
            redundant = {t for t, r in zip(texts, rules, strict=True) if listed(space, without=r) == legal} - idle
            assert {f.constraints[0] for f in found if f.code == "redundant"} == redundant
            unusable = {
                (slot.name, option.id)
                for s, slot in enumerate(space.slots)
                for i, option in enumerate(slot.options)
                if all(row[s] != i for row in legal)
            }
            told = {(f.slot, m) for f in found if f.code == "unusable_material" for m in f.materials}
            assert told == unusable


# ── borders ──


def test_spaces_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="at least one slot"):
        Space(())
    with pytest.raises(InputError, match="name that is its own"):
        Space((SLOTS[0], SLOTS[0]))
    with pytest.raises(InputError, match="name that is its own"):
        Space((Slot("variant_id", ()),))
    with pytest.raises(InputError, match="position 8: no slot is called layout"):
        Space(SLOTS, (parse("forbid layout:l1"),))
    with pytest.raises(InputError, match="no slot is called 'layout'"):
        Space(SLOTS, (), (Forbidden("copy", "layout", np.zeros((2, 2), np.bool_)),))
    with pytest.raises(InputError, match=r"bool of shape \(2, 2\)"):
        Space(SLOTS, (), (Forbidden("copy", "image", np.zeros((2, 3), np.bool_)),))
    with pytest.raises(InputError, match="at least 1"):
        explode(Space(SLOTS), batch_rows=0)
    with pytest.raises(InputError, match="no variant is legal"):
        sample(Space(SLOTS, (parse("forbid copy:c1|c2"),)), 1, np.random.default_rng(0))


def test_terms_without_slots_do_not_blow_up() -> None:
    slots = tuple(Slot(f"s{s}", (Option("m", {"a": ("x",), "b": ("y",)}), Option("n"), Option("o"))) for s in range(20))
    texts = ("forbid a=x with b=y with a=x with b=y with a=*", "require a=x when b=y", "require a=x")
    space = Space(slots, tuple(parse(text, slots) for text in texts[:1]))
    assert count(space) == 2**20
    assert count(Space(slots, tuple(parse(text, slots) for text in texts[1:]))) == 3**20 - 2**20
    (finding,) = diagnose(Space(slots, tuple(parse(text, slots) for text in texts[1:])))
    assert (finding.code, finding.constraints) == ("forbids_nothing", texts[1:2])


# ------------------------------------------------------------------------------------------------ how much work


def tangled(slots: int, materials: int, rules: int) -> Space:
    """Rules on random pairs of materials that tie all slots together."""
    rng = np.random.default_rng(0)
    made = tuple(Slot(f"s{s}", tuple(Option(f"m{s}-{m}") for m in range(materials))) for s in range(slots))
    texts = []
    for _ in range(rules):
        (a, b), m = rng.choice(slots, 2, replace=False), rng.choice(materials, 4)
        texts.append(f"forbid s{a}:m{a}-{m[0]}|m{a}-{m[1]} with s{b}:m{b}-{m[2]}|m{b}-{m[3]}")
    return Space(made, tuple(map(parse, texts)))


QUESTIONS = [count, diagnose, pair_support, lambda space: cover(space, 50)]


@pytest.mark.parametrize("ask", QUESTIONS, ids=["count", "diagnose", "pair_support", "cover"])
def test_a_question_that_takes_too_long_is_refused_after_a_bounded_amount_of_work(
    ask: Callable[[Space], object],
) -> None:
    space = tangled(12, 20, 60)
    with work_limit(1e7), pytest.raises(TooComplexError, match="fewer rules"):
        ask(space)


def test_the_limit_is_there_without_asking_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combiner.work_limit.__wrapped__, "__defaults__", (1e7,))  # type: ignore[attr-defined]
    with pytest.raises(TooComplexError):
        count(tangled(12, 20, 60))
    assert count(tangled(12, 20, 3)) > 0


def test_questions_in_a_block_share_one_limit_and_the_next_block_has_its_own() -> None:
    space = tangled(6, 10, 8)
    for _ in range(2):
        with work_limit(1e9):
            count(space)
    with work_limit(0), pytest.raises(TooComplexError):
        count(space)
    with work_limit(0), pytest.raises(TooComplexError), work_limit(1e9):
        count(space)


def test_what_there_was_no_time_to_look_for_is_said() -> None:
    tied = tangled(8, 12, 14)
    space = Space(tied.slots, (*tied.constraints, parse("forbid s0:m0-0"), parse("forbid s0:m0-0 with s1:m1-0")))
    everything = diagnose(space)
    with work_limit(6e5):
        some = diagnose(space)
    assert {finding.code for finding in everything} == {"unusable_material", "redundant"}
    assert "not_all_checked" in {finding.code for finding in some}
    assert {finding for finding in some if finding.code != "not_all_checked"} < set(everything)
