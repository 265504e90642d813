"""Where an edit or a subject is lost: the linear map from a condition to a scene, and the table."""

import sys

import torch
from conftest import check_refused, run

from benchmarks.ceilings import cases_by_number, fit_readout, read_scenes, scene_labels
from toy.scene import Object, Scene
from toy.tasks import task


def test_a_linear_map_reads_scenes_from_what_holds_them_and_from_nothing_else():
    scenes = [task("edit", i).target for i in range(600)]
    labels = torch.stack([scene_labels(scene) for scene in scenes])  # (S, 4, 9)
    torch.manual_seed(0)
    one_hot = torch.nn.functional.one_hot(labels, 9).flatten(1).float()
    mixed = one_hot @ torch.randn(one_hot.shape[1], 200) / 10  # every label is in each number
    holds = torch.cat([mixed, torch.ones(600, 1)], 1)
    for x, is_right in ((holds, True), (torch.randn_like(holds), False)):
        read = read_scenes(x[500:], fit_readout(x[:500], scenes[:500]))
        right = (read == labels[500:]).flatten(1).all(1).float().mean()
        assert right > 0.95 if is_right else right < 0.05


def test_labels_tell_the_object_at_each_place():
    core = Object("circle", "red", 47, 33, pattern="core", inner="green")
    colours, shapes, patterns, inner = scene_labels(Scene((Object("star", "blue", 17, 15), core)))
    assert colours.tolist() == [3, 0, 0, 0, 0, 1, 0, 0, 0]
    assert shapes.tolist() == [4, 0, 0, 0, 0, 1, 0, 0, 0]
    assert patterns.tolist() == [1, 0, 0, 0, 0, 3, 0, 0, 0]
    assert inner.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0]


def test_as_many_unseen_cases_of_each_number_of_objects():
    for kind, numbers in (("edit", [1, 2, 3, 4]), ("free edit", [1, 2, 3]), ("two subjects", [2])):
        cases = cases_by_number(kind, 3, seed=0)
        assert list(cases) == numbers
        for number, made in cases.items():
            assert [sum(len(s.objects) for s in t.sources) for t in made] == [number] * 3
            assert any(task(kind, i, split="test") == made[0] for i in range(100))


def test_the_command_prints_a_row_for_each_number_of_objects():
    flags = ["--limit", "1", "--samples", "8", "--steps", "1"]
    done = run([sys.executable, "-m", "benchmarks.ceilings", *flags])
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[-5] for row in rows] == ["1", "2", "3", "4", "1", "2", "3", "1", "2", "3"]
    assert all(0 <= float(share) <= 1 for row in rows for share in row[-4:])
    check_refused(run([sys.executable, "-m", "benchmarks.ceilings", "--limit", "0"]), "--limit")
