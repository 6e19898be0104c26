"""The generated pages are those of the code as it is, and links lead somewhere."""

import re

import numpy as np

from docs import generate
from docs.differences import DIFFERENCES
from sapo_jax.objectives import OBJECTIVES

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def test_pages_are_up_to_date():
    """Numbers may differ in the last digit that is shown; otherwise: python -m docs.generate."""
    wanted = generate.files()
    kept = {f"algorithms/{path.name}" for path in (generate.OUT / "algorithms").iterdir()}
    assert kept | {"metrics.md", "judging.md"} == set(wanted)
    for name, content in wanted.items():
        stored = (generate.OUT / name).read_text(encoding="utf-8")
        assert NUMBER.split(stored) == NUMBER.split(content), f"{name} is out of date"
        old, new = (np.array(NUMBER.findall(text), float) for text in (stored, content))
        np.testing.assert_allclose(old, new, rtol=2e-3, atol=0.11, err_msg=name)


def anchors(path):
    """Of the headings of a page, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    root = generate.OUT.parent
    pages = [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("experiments/*/*.md")]
    for page in pages:
        for link in LINK.findall(page.read_text()):
            path, _, anchor = link.partition("#")
            if not path.startswith(("https:", "mailto:")):
                target = page.parent / path if path else page
                assert target.exists(), f"{page} links to {link}"
                assert not anchor or anchor in anchors(target), f"{page} links to {link}"


def test_the_tree_of_the_readme_is_that_of_the_package():
    """It names every file once, under its folder, with what it is for."""
    root = generate.OUT.parent
    text = (root / "README.md").read_text()
    assert text.count("\n") <= 200
    listed, folders = [], []
    for line in re.search(r"```\n(sapo_jax/\n.*?)```", text, re.DOTALL)[1].splitlines():
        indent, names, meaning = re.fullmatch(r"( *)((?:\S+(?:\.py|/) ?)+) *(.*)", line).groups()
        folders = folders[: len(indent) // 2]
        if names.strip().endswith("/"):
            folders.append(names.strip())
        else:
            assert meaning, line
            listed += ["".join(folders) + name for name in names.split()]
    package = (root / "sapo_jax").rglob("*.py")
    files = [str(p.relative_to(root)) for p in package if not p.name.startswith("__")]
    assert sorted(name for name in listed if name.startswith("sapo_jax/")) == sorted(files)


def test_the_quickstart_of_the_readme_is_that_of_its_results():
    """Otherwise: python -m experiments.quickstart.run --plot_only, and the sentence again."""
    root, found = generate.OUT.parent, {}
    for line in (root / "experiments/quickstart/results/table.md").read_text().splitlines()[2:]:
        name, seeds, _, end = (cell.strip() for cell in line.strip("|").split("|"))
        found[name] = end.split()[0]
    sentence = f"it ends at {found['sapo']}, GRPO at {found['grpo']}, GSPO at {found['gspo']} ("
    assert sentence in " ".join((root / "README.md").read_text().split())
    assert seeds == "5"


def test_the_pictures_of_the_readme_are_those_of_their_results():
    """Otherwise: python -m experiments.vision.run --report_only, and the sentence again."""
    root, found = generate.OUT.parent, {}
    for line in (root / "experiments/vision/results/table.md").read_text().splitlines()[4:]:
        name, _, *tasks = (cell.strip() for cell in line.strip("|").split("|"))
        found[name] = [task.partition(" (")[0] for task in tasks]
    sums, shapes, text = found["sapo"]
    blind = [task.rpartition(" ")[2] for task in found["sapo, images swapped"]]
    sentence = (
        f"sums in pictures {sums}, shapes {shapes}, sums in text {text}; "
        f"with the images swapped {blind[0]}, {blind[1]} and {blind[2]}."
    )
    assert sentence in " ".join((root / "README.md").read_text().split())


def test_every_preset_says_how_implementations_differ():
    assert set(DIFFERENCES) == set(OBJECTIVES)


def test_coefficients_are_those_of_the_table():
    """The pages show c of the loss itself: GMPO's clip, which is part of its ratio, included."""
    at = [len(generate.CURVE) + generate.GRID.index(r) for r in (1.0, 2.0)]
    for name, expected in (("sapo", [[1, 1.5728954], [1, 1.5362196]]), ("gmpo", [[1, 0], [1, 2]])):
        found = np.array(generate.coefficients(name))[:, at]
        np.testing.assert_allclose(found, expected, rtol=1e-7)
