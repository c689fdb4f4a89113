"""What a teacher that remembers gives, and where it keeps it, for any batches, settings and weights."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from d2distill.common.cached_teacher import CachedTeacher, TeacherMemory
from d2distill.common.engine.weight_files import weights_digest
from d2distill.common.outputs import Batch, Outputs
from d2distill.common.teachers import LiveTeacher

VARIANTS = 3
#: Logits of images by their number. A row in a file is three of them, padded, and a checksum.
LOGITS = torch.arange(64, dtype=torch.float32)[:, None] * torch.tensor([1.0, -1.0, 0.125])
ROW_BYTES = 24


class Given(nn.Module):
    """Gives the logits of images whose pixels are their number."""

    def outputs(self, images):
        return Outputs(LOGITS[images[:, 0, 0, 0].long()])


def remembering(adapt=nn.Identity(), **memory):  # noqa: B008
    source = LiveTeacher(Given(), adapt)
    source.needs = {"logits"}
    return CachedTeacher(source, Outputs(LOGITS[:1]), TeacherMemory(name="t", samples=8, **memory), torch.device("cpu"))


SAMPLES = st.lists(st.tuples(st.integers(0, 7), st.integers(-1, VARIANTS - 1)), max_size=20)


@given(batches=st.lists(SAMPLES, max_size=5), kept=st.integers(0, 8), runs=st.integers(1, 2))
def test_any_order_and_split_of_batches_gives_what_the_teacher_gives(batches, kept, runs):
    """In turn by two runs that share a folder. What has a row is not computed again."""
    computed, known = [], set()

    def adapt(images):
        computed.extend(images[:, 0, 0, 0].tolist())
        return images

    with TemporaryDirectory() as folder:
        memory = {
            "folder": Path(folder),
            "identity": {},
            "variants": VARIANTS,
            "max_bytes": kept * VARIANTS * ROW_BYTES,
        }
        teachers = [remembering(adapt, **memory) for _ in range(runs)]
        for turn, batch in enumerate(batches):
            index, key = torch.tensor(batch, dtype=torch.long).reshape(-1, 2).T
            number = 8 * (key + 1) + index
            images = number.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
            logits = teachers[turn % runs](images, Batch(host_index=index, key=key)).logits
            assert torch.equal(logits, LOGITS[number]) and known.isdisjoint(computed)
            known.update(each for each in computed if each >= 8 and each % 8 < kept)
            computed.clear()


WORDS = st.text('ab1é"\\:,{}', max_size=3)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS
MEMORIES = st.fixed_dictionaries(
    {
        "identity": st.dictionaries(WORDS, PLAIN | st.lists(PLAIN, max_size=2), max_size=3),
        "variants": st.integers(1, 4),
        "logits_dtype": st.sampled_from([None, torch.float16]),
        "top_k": st.integers(0, 3),
        "precision": st.sampled_from([None, torch.bfloat16]),
    }
)


SOME = {"identity": {}, "variants": 1, "logits_dtype": None, "top_k": 0, "precision": None}


@given(one=MEMORIES, change=MEMORIES, changed=st.sets(st.sampled_from([*SOME])))
# A row's number depends on how many variants an image has.
@example(one=SOME, change={**SOME, "variants": 2}, changed={"variants"})
def test_what_differs_in_anything_is_in_another_folder(one, change, changed):
    two = one | {name: change[name] for name in changed}

    def key(memory):  # the order of an identity does not matter; 1, 1.0 and True are not the same
        return repr({**memory, "identity": sorted(memory["identity"].items(), key=lambda entry: entry[0])})

    folders = [remembering(folder=Path("cache"), max_bytes=0, **memory).folder for memory in (one, two)]
    assert (folders[0] == folders[1]) == (key(one) == key(two))


NETWORK = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.PReLU(), nn.Linear(2, 2).bfloat16())


@given(tensor=st.integers(0, len(NETWORK.state_dict()) - 1), bit=st.integers(0))
def test_a_changed_bit_of_the_weights_is_another_teacher(tensor, bit):
    before, value = weights_digest(NETWORK), [*NETWORK.state_dict().values()][tensor]
    bits = value.detach().reshape(-1).view(torch.uint8)

    def flip():
        bits[bit // 8 % len(bits)] ^= 1 << bit % 8

    flip()
    changed = weights_digest(NETWORK)
    flip()
    assert changed != before == weights_digest(NETWORK)
