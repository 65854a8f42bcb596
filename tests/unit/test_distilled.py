"""Distilled Decoding: the map from noise, the student, its sampler and its training."""

import dataclasses

import pytest
import torch

from genlab.code_flow import CodeFlow, code_vectors
from genlab.distributions import Categorical
from genlab.generators.base import Guidance, Text
from genlab.generators.distilled import START_GAINS, Distilled, DistilledConfig, MapConfig
from genlab.generators.elm import ELM, ELMConfig
from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from genlab.generators.var import VAR, VARConfig
from genlab.hub import from_pretrained
from genlab.noise import Noise
from samplers.distilled import DistilledSampler, DistilledSamplerConfig, follow

SIZES = {"num_classes": 3, "dim": 32, "depth": 1, "heads": 2}
NETS = {
    "llamagen": LlamaGenConfig(grid=(3, 2), vocab=7, dropout=0.0, **SIZES),
    "text": LlamaGenConfig(grid=(3, 2), vocab=7, dropout=0.0, condition="text", text_dim=6, text_length=5, **SIZES),
    "elm": ELMConfig(grid=(3, 2), sub_tokens=2, bits=3, dropout=0.0, **SIZES),
    "var": VARConfig(scales=(1, 2, 3), vocab=9, code_dim=4, **SIZES),
}
CLASSES = {"llamagen": LlamaGen, "elm": ELM, "var": VAR}
B = 3


def randomise(model, size=1.0, seed=0):
    """Weights of ordinary size everywhere: the published starts leave heads at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5 + (p.ndim == 1))
            if name.startswith(("output", "head.")):
                p.mul_(size)
    return model.eval()


def make(name, **options):
    """A teacher, and its student before training."""
    net = NETS[name]
    teacher = randomise(CLASSES[net.kind](net), 2.0)
    code_dim = {"elm": 3, "var": 4}.get(net.kind, 4)
    student = Distilled(DistilledConfig(net=net, code_dim=code_dim, map=MapConfig(steps=30), **options)).eval()
    student.net.load_state_dict(teacher.state_dict())
    student.codes.copy_(torch.randn(student.codes.shape, generator=torch.Generator().manual_seed(3)))
    return teacher, student


def condition(name, rows=B):
    if name == "text":
        g = torch.Generator().manual_seed(1)
        return Text(torch.randn(B, 4, 6, generator=g), torch.tensor([[0, 1, 1, 1]] * B).bool())[:rows]
    return torch.tensor([0, 2, 1])[:rows]


def through(teacher, student, cond, noise, stop=None):
    """What the teacher's map makes of the noise, (B, L, K)."""
    state = teacher.start(cond, student.config.map.guidance)
    eps = student.noise_of(noise)
    events = follow(teacher, state, student.flow, student.config.map, eps, stop or teacher.n_groups)
    return torch.cat(list(events), 1)


# -- the map --------------------------------------------------------------------------------------------------------


def test_a_point_mass_takes_all_noise():
    logits = torch.full((1, 50, 1, 6), -torch.inf)
    logits[..., 4] = 0.0
    ids = CodeFlow(torch.randn(6, 3)).ids(Categorical(logits), torch.randn(1, 50, 3))
    assert bool((ids == 4).all())


def test_ids_without_mass_never_come():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4000, 1, 12, generator=g)
    logits = Categorical(logits).top_k(3).logits_BGKV
    for method, steps in (("euler", 2), ("heun", 4)):
        flow = CodeFlow(torch.randn(12, 2, generator=g), method, steps)
        ids = flow.ids(Categorical(logits), torch.randn(1, 4000, 2, generator=g))
        assert bool((logits.gather(-1, ids[..., None]) > -torch.inf).all())


def test_heads_are_apart_and_batches_change_nothing():
    g = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(4, 5, 2, 8, generator=g), torch.randn(4, 5, 6, generator=g)
    flow = CodeFlow(torch.randn(8, 3, generator=g), "heun", 10)
    ids = flow.ids(Categorical(logits), noise)
    for k in range(2):
        one = flow.ids(Categorical(logits[:, :, k : k + 1]), noise[..., 3 * k : 3 * k + 3])
        assert torch.equal(one[..., 0], ids[..., k])
    assert torch.equal(flow.ids(Categorical(logits[1:2]), noise[1:2]), ids[1:2])


def test_misuse_of_the_map_is_refused():
    with pytest.raises(ValueError, match="at least 1 step"):
        CodeFlow(torch.zeros(3, 2), "heun", 0)
    with pytest.raises(ValueError, match="need noise"):
        CodeFlow(torch.zeros(3, 2)).ids(Categorical(torch.zeros(1, 1, 2, 3)), torch.zeros(1, 1, 2))


def test_codes_of_tokenizers():
    from types import SimpleNamespace

    from genlab.tokens import TokenSpec

    bits = code_vectors(SimpleNamespace(kind="bae", spec=TokenSpec(kind="binary", grid=(2, 2), vocab=8, depth=2)))
    assert bits.tolist()[5] == [1, -1, 1]  # most significant first
    discrete = TokenSpec(kind="discrete", grid=(2, 2), vocab=9)
    book = torch.randn(9, 4) * 3 + 1
    for tokenizer in (
        SimpleNamespace(kind="vq", spec=discrete, codebook=book),
        SimpleNamespace(kind="msvq", spec=discrete, quantiser=SimpleNamespace(codebook=book)),
    ):
        codes = code_vectors(tokenizer)
        assert codes.mean(0).abs().max() < 1e-6
        assert float(codes.square().mean()) == pytest.approx(1)
    continuous = TokenSpec(kind="continuous", grid=(2, 2), dim=4)
    with pytest.raises(ValueError, match="no codes"):
        code_vectors(SimpleNamespace(kind="kl_vae", spec=continuous))


# -- the student ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_grad(request):
    if "train" in request.node.name:
        yield
        return
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", NETS)
def test_a_fresh_student_that_knows_what_came_before_is_its_teacher(name):
    """Its logits, bent by the noise, which nearly decides as the map does."""
    teacher, student = make(name)
    cond, eps = condition(name), student.noise_of(Noise(torch.arange(B)))
    ids = through(teacher, student, cond, Noise(torch.arange(B)))
    state, hits = teacher.start(cond, student.config.map.guidance or teacher.default_guidance), []
    unguided = teacher.start(cond, Guidance())
    for g in range(teacher.n_groups):
        where = teacher.where(g)
        want = teacher.predict(unguided).logits_BGKV
        first = torch.full((B,), int(where[0]))
        have = student.logits(student.check_condition(cond), ids, first, eps)[:, where]
        bent = want + START_GAINS[0] * student.pull(want, eps[:, where].float())
        assert (have - bent).abs().max() < 1e-4 * bent.abs().max()
        guided = teacher.predict(state).logits_BGKV
        decided = (guided + student.pull(guided, eps[:, where].float())).argmax(-1)
        hits.append((decided == ids[:, where]).float().flatten())
        for s in (state, unguided):
            teacher.commit(s, ids[:, where])
    assert float(torch.cat(hits).mean()) > 0.75


@pytest.mark.parametrize("name", NETS)
def test_a_token_depends_on_what_comes_before_it_alone(name):
    """Known ids and the noise up to a group decide it; unknown ids, known ones' noise and later noise don't."""
    _, student = make(name)
    torch.manual_seed(0)
    student.noise_proj.weight.normal_()
    student.unknown.normal_()
    cond = student.check_condition(condition(name))
    g = torch.Generator().manual_seed(5)
    L, V = student.spec.length, student.spec.vocab
    ids, eps = torch.randint(0, V, (B, L, student.K), generator=g), torch.randn(B, L, student.M, generator=g)
    first = torch.tensor([0, student.ends[0], student.ends[1]])
    want = student.logits(cond, ids, first, eps)
    known = torch.arange(L) < first[:, None]
    other, noise = (ids + 1) % V, torch.randn(eps.shape, generator=g)
    same = student.logits(
        cond, torch.where(known[..., None], ids, other), first, torch.where(known[..., None], noise, eps)
    )
    assert torch.allclose(same[~known], want[~known], atol=1e-5)
    last = student.where(student.n_groups - 1)
    later = eps.clone()
    later[:, last] = noise[:, last]
    moved = student.logits(cond, ids, first, later)
    assert torch.allclose(moved[:, : last[0]], want[:, : last[0]], atol=1e-5)
    assert (moved[:, last] - want[:, last]).abs().amax((0, 2, 3)).min() > 1e-3
    earlier = eps.clone()
    earlier[0, 0] = noise[0, 0]
    assert (student.logits(cond, ids, first, earlier)[0, last] - want[0, last]).abs().max() > 1e-4


@pytest.mark.parametrize("name", NETS)
def test_state_of_a_student(name):
    _, student = make(name)
    cond, noise = condition(name), Noise(torch.arange(B))
    state = student.start(cond)
    dist = student.predict(state)
    event = dist.sample(noise.at(position=student.rest(state)))
    assert tuple(event.shape) == (B, student.spec.length, student.K)
    student.commit(state, event[:, : student.ends[1]])
    with pytest.raises(ValueError, match="older state"):
        dist.sample(noise.at(position=student.rest(state)))
    with pytest.raises(ValueError, match="are committed"):
        student.tokens(state)
    again = student.predict(state).sample(noise.at(position=student.rest(state)))
    assert again.shape[1] == student.spec.length - student.ends[1]
    student.commit(state, again)
    assert torch.equal(student.tokens(state).values.view(B, -1, student.K)[:, student.ends[1] :], again)
    with pytest.raises(ValueError, match="committed already"):
        student.predict(state)
    student.crop(state, [1] * B)
    cropped = student.predict(state).sample(noise.at(position=student.rest(state)))
    assert cropped.shape[1] == student.spec.length - student.ends[0]
    with pytest.raises(ValueError, match="whole groups"):
        student.commit(state, event[:, :0])
    with pytest.raises(ValueError, match="can't crop"):
        student.crop(state, [2] * B)
    with pytest.raises(ValueError, match="leave --guidance away"):
        student.start(cond, Guidance(scale=2.0))
    assert state.calls == 3


# -- the sampler ----------------------------------------------------------------------------------------------------


def sampler(**options):
    return DistilledSampler(DistilledSamplerConfig(**options))


@pytest.fixture
def pair(tmp_path):
    """A saved teacher, and its student."""

    def build(name):
        teacher, student = make(name)
        teacher.save_pretrained(tmp_path / "teacher")
        return teacher, student, str(tmp_path / "teacher")

    return build


@pytest.mark.parametrize("name", NETS)
def test_the_teacher_alone_is_its_map(pair, name):
    teacher, student, folder = pair(name)
    n = teacher.n_groups
    for options in ({"teacher_groups": n}, {"teacher_groups": n - 1, "steps": 2, "starts": (0, n - 1)}):
        out = sampler(teacher=folder, **options).sample(student, condition(name), torch.arange(B))
        want = through(teacher, student, condition(name), Noise(torch.arange(B)))
        known = student.ends[options["teacher_groups"] - 1]
        assert torch.equal(out.tokens.values.view(B, -1, student.K)[:, :known], want[:, :known])
        assert out.stats.model_calls == n


@pytest.mark.parametrize("name", NETS)
def test_a_student_draws_in_bfloat16(pair, name):
    _, student, folder = pair(name)
    student = student.to(torch.bfloat16)
    for options in ({}, {"steps": 2}, {"teacher": folder, "teacher_groups": 1}):
        out = sampler(**options).sample(student, condition(name), torch.arange(B))
        ids = out.tokens.values
        assert bool(((ids >= 0) & (ids < student.spec.vocab)).all())


@pytest.mark.parametrize("name", ["llamagen", "var"])
def test_steps_by_hand(pair, name):
    teacher, student, folder = pair(name)
    cond, noise = condition(name), Noise(torch.arange(B))
    eps, cut = student.noise_of(noise), student.ends[1]
    zeros = torch.zeros(B, student.spec.length, student.K, dtype=torch.long)
    one = student.logits(student.check_condition(cond), zeros, torch.zeros(B).long(), eps).argmax(-1)
    out = sampler().sample(student, cond, torch.arange(B))
    assert torch.equal(out.tokens.values.view_as(one), one)
    assert out.stats.model_calls == 1
    assert out.stats.rows == B
    two = student.logits(student.check_condition(cond), one, torch.full((B,), cut), eps).argmax(-1)
    two[:, :cut] = one[:, :cut]
    out = sampler(steps=2, starts=(0, 2)).sample(student, cond, torch.arange(B))
    assert torch.equal(out.tokens.values.view_as(two), two)
    assert out.stats.model_calls == 2
    # the teacher draws one group behind the student's first
    state = teacher.start(cond)
    teacher.commit(state, one[:, student.where(0)])
    (event,) = follow(teacher, state, student.flow, student.config.map, eps, 2)
    mixed = torch.cat([one[:, : student.ends[0]], event, zeros[:, cut:]], 1)
    rest = student.logits(student.check_condition(cond), mixed, torch.full((B,), cut), eps).argmax(-1)
    mixed[:, cut:] = rest[:, cut:]
    out = sampler(steps=2, starts=(0, 2), teacher_groups=1, teacher=folder).sample(student, cond, torch.arange(B))
    assert torch.equal(out.tokens.values.view_as(mixed), mixed)
    assert out.stats.model_calls == 3


def test_published_starts():
    big = Distilled(DistilledConfig(net=LlamaGenConfig(grid=(16, 16), vocab=7, dropout=0.0, **SIZES), code_dim=4))
    assert sampler(steps=2).starts(big) == [0, 80]
    assert sampler(steps=1, teacher_groups=80).starts(big) == [80]
    var = Distilled(DistilledConfig(net=VARConfig(vocab=9, code_dim=4, **SIZES), code_dim=4))
    assert sampler(steps=2).starts(var) == [0, 5]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, r"steps must be in 1\.\.6"),
        ({"steps": 7}, r"steps must be in 1\.\.6"),
        ({"steps": 2, "starts": (1, 3)}, "starts must rise from 0"),
        ({"steps": 2, "starts": (0, 6)}, "starts must rise from 0"),
        ({"steps": 2, "starts": (0,)}, "starts as many"),
        ({"steps": 2, "starts": (0, 2), "teacher_groups": 3}, r"teacher_groups must be in 0\.\.2"),
        ({"teacher_groups": 1}, "names no teacher"),
        ({"guidance": Guidance(scale=2.0)}, "leave --guidance away"),
    ],
)
def test_options_that_cannot_be_are_refused(options, match):
    _, student = make("llamagen")
    with pytest.raises(ValueError, match=match):
        sampler(**options).sample(student, condition("llamagen"), torch.arange(B))


def test_another_teacher_is_refused(pair):
    _, _, folder = pair("elm")
    _, student = make("llamagen")
    with pytest.raises(ValueError, match="not this student's teacher"):
        sampler(teacher=folder, teacher_groups=1).sample(student, condition("llamagen"), torch.arange(B))


# -- training -------------------------------------------------------------------------------------------------------

CONV = {"image_size": 16, "patch": 4, "channels": (8,), "layers": 1, "decoder_layers": 1, "features": 8}
CONV |= {"norm_groups": 4, "attention_levels": ()}


@pytest.fixture
def line(tmp_path):
    """A saved tokenizer and a saved teacher on its tokens, of random weights: 1 to 2 bits a token."""
    from tokenizers_img.bae import BAE, BAEConfig
    from tokenizers_img.msvq import MSVQ, MSVQConfig
    from tokenizers_img.vq import VQ, VQConfig

    def build(kind):
        torch.manual_seed(0)
        size = {"num_classes": 2, "dim": 48, "depth": 2, "heads": 2}
        if kind == "llamagen":
            tokenizer = VQ(VQConfig(**CONV, codes=8, dim=4))
            teacher = LlamaGen(LlamaGenConfig(grid=(4, 4), vocab=8, **size))
        elif kind == "elm":
            tokenizer = BAE(BAEConfig(**CONV, sub_tokens=2, bits=2))
            teacher = ELM(ELMConfig(grid=(4, 4), sub_tokens=2, bits=2, **size))
        else:
            tokenizer = MSVQ(MSVQConfig(**CONV, codes=8, dim=4, scales=(1, 2, 4), phis=2))
            teacher = VAR(VARConfig(scales=(1, 2, 4), vocab=8, code_dim=4, phis=2, **size))
        randomise(teacher, 1.5)
        if kind == "var":
            teacher.adopt(tokenizer)
        teacher.extra |= {"tokenizer": str(tmp_path / "tokenizer"), "data": {"source": "gone", "classes": ["a", "b"]}}
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        teacher.save_pretrained(tmp_path / "teacher")
        return teacher

    return build


def student_run(folder, teacher, **changes):
    from train.config import OptimConfig, run_config

    net = teacher.config
    net = dataclasses.replace(net, dropout=0.0) if hasattr(net, "dropout") else net
    options = {"map": MapConfig(guidance=Guidance(), steps=10), "pairs": 512, "teacher": str(folder / "teacher")}
    options |= changes.pop("model", {})
    code_dim = 2 if teacher.kind == "elm" else 4
    fields = {
        "name": "dd-tiny",
        "model": DistilledConfig(net=net, code_dim=code_dim, **options),
        "optim": OptimConfig(lr=3e-3, warmup=256),
        "images": 48 * 32, "batch_size": 32, "precision": "fp32", "sample_every": 0, "save_every": 0, "threads": 1,
        "ema": 0.9,
    }  # fmt: skip
    return run_config(**{**fields, **changes})


def agreement(model, teacher, options, n=64):
    """Share of tokens equal to the teacher's, on noise that wasn't trained on."""
    labels, seeds = torch.arange(n) % 2, torch.arange(n)
    with torch.no_grad():
        want = through(teacher, model, labels, Noise(seeds))
    out = sampler(**options).sample(model, labels, seeds)
    return float((out.tokens.values.view_as(want) == want).float().mean()), want


@pytest.mark.parametrize("kind", ["llamagen", "elm", "var"])
def test_train_a_student(tmp_path, line, kind):
    """With no data at all, it learns where its teacher's noise leads: more than which tokens are frequent."""
    from train.loop import train

    teacher = line(kind)
    model = from_pretrained(train(student_run(tmp_path, teacher), tmp_path / "run", device="cpu"))
    one, want = agreement(model, teacher, {})
    two, _ = agreement(model, teacher, {"steps": 2})
    # the best constant guess of each class and place
    frequent = sum(float((want[c::2] == want[c::2].mode(0).values).float().mean()) for c in (0, 1)) / 2
    assert one > frequent + 0.1
    assert two > one - 0.02
    assert model.extra["tokenizer"] == str(tmp_path / "tokenizer")
    assert model.extra["data"]["classes"] == ["a", "b"]


def test_the_pair_set_is_what_the_map_makes_of_its_seeds_and_goes_on_where_it_stopped(tmp_path, line, monkeypatch):
    from train import distill

    monkeypatch.setenv("GENLAB_CACHE", str(tmp_path / "cache"))
    teacher = line("elm")
    config = student_run(tmp_path, teacher, model={"pairs": 150})
    drawn, real = [], distill.draw

    def draw(teacher, condition, seeds, *rest):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(seeds[0].item())
        return real(teacher, condition, seeds, *rest)

    monkeypatch.setattr(distill, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        distill.distill_task(config)
    del drawn[1]  # room for one more, which must be the third shard
    pairs = distill.distill_task(config).images
    assert drawn == pairs.seeds[[0, 128]].tolist()
    assert len(pairs) == 150
    batch = distill.distill_task(config).load(0, 150)
    student = Distilled(config.model).eval()
    student.inherit(teacher, from_pretrained(tmp_path / "tokenizer"))
    want = through(teacher, student, batch.labels, batch.noise)
    assert float((batch.x == want).float().mean()) > 0.999  # drawn in other batches: a tie may fall elsewhere
    assert set(batch.labels.tolist()) == {0, 1}
    assert int(batch.noise.seeds_B.min()) >= 1 << 62
    # a damaged shard is drawn again, a whole one is kept, more pairs extend the set
    monkeypatch.setattr(distill, "draw", real)
    shard = sorted(pairs.folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    again = distill.distill_task(student_run(tmp_path, teacher, model={"pairs": 200})).images
    assert torch.equal(again.tokens[:150], pairs.tokens)
    assert again.folder == pairs.folder
    guided = {"pairs": 64, "map": MapConfig(guidance=Guidance(scale=2.0), steps=10)}
    assert distill.distill_task(student_run(tmp_path, teacher, model=guided)).images.folder != pairs.folder


def test_what_is_known_changes_from_step_to_step(tmp_path, line):
    from train.distill import distill_task

    task = distill_task(student_run(tmp_path, line("var"), model={"pairs": 64, "from_noise": 0.01}))
    batch = task.load(0, 64)
    one, same, other = (float(task(batch, seen)["loss"].detach()) for seen in (0, 0, 64))
    assert one == same
    assert one != other


def test_train_a_student_by_text(tmp_path, monkeypatch):
    """Captions from a file: neither images nor the data they came from are there."""
    import genlab.text
    from tokenizers_img.vq import VQ, VQConfig
    from train.distill import distill_task
    from train.loop import train

    class Encoder:
        """Letters."""

        dim = 6

        def __init__(self, name, length):
            self.name, self.length, self.pad, self.model = name, length, False, torch.nn.Linear(1, 1)

        def encode(self, caption):
            return torch.stack([torch.cos(torch.arange(6) * ord(x)) for x in caption[: self.length]])

        def encode_many(self, captions, dtype=torch.float32, **_):
            return [self.encode(c).to(dtype) for c in captions]

        def to(self, device):
            return self

        def __call__(self, captions):
            return genlab.text.stack_captions([self.encode(c) for c in captions])

    monkeypatch.setattr(genlab.text, "TextEncoder", Encoder)
    tokenizer = VQ(VQConfig(**CONV, codes=7, dim=4))
    teacher = randomise(LlamaGen(dataclasses.replace(NETS["text"], grid=(4, 4))), 1.5)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    teacher.extra |= {"tokenizer": str(tmp_path / "tokenizer"), "data": {"source": str(tmp_path / "gone")}}
    teacher.save_pretrained(tmp_path / "teacher")
    short = {"pairs": 64, "map": MapConfig(steps=4)}
    with pytest.raises(ValueError, match="text encoder"):
        distill_task(student_run(tmp_path, teacher, model=short))
    teacher.extra["text_encoder"] = "letters"
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(FileNotFoundError, match=r"--model.captions FILE.txt"):
        distill_task(student_run(tmp_path, teacher, model=short))
    (tmp_path / "captions.txt").write_text("a cat\n\nsome dog\n")
    config = student_run(tmp_path, teacher, model=short | {"captions": str(tmp_path / "captions.txt")}, images=64)
    assert len(distill_task(config).shown) == 8
    model = from_pretrained(train(config, tmp_path / "run", device="cpu"))
    assert model.by_text
    assert model.extra["text_encoder"] == "letters"
    out = sampler(steps=2).sample(model, Encoder("letters", 5)(["a cat", "dog"]), torch.arange(2))
    assert tuple(out.tokens.values.shape) == (2, 16)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": {"teacher": ""}}, "needs a teacher"),
        ({"model": {"pairs": 0}}, "needs pairs"),
        ({"model": {"captions": "c.txt"}}, "draws by class"),
        ({"tokenizer": "vq-f4-emoji64"}, "reads the tokens of"),
    ],
)
def test_training_options_that_cannot_be_are_refused(tmp_path, line, changes, match):
    from train.tasks import build_task

    with pytest.raises(ValueError, match=match):
        build_task(student_run(tmp_path, line("elm"), **changes))


def test_a_teacher_of_other_sizes_is_refused(tmp_path, line):
    from train.tasks import build_task

    teacher = line("elm")
    config = student_run(tmp_path, teacher)
    wider = dataclasses.replace(config.model, net=dataclasses.replace(config.model.net, dim=96))
    with pytest.raises(ValueError, match=r"set the --model\.net"):
        build_task(dataclasses.replace(config, model=wider))


def test_presets_name_teachers_of_their_sizes():
    from train.presets import PRESETS

    for name in ("dd-llamagen-emoji64", "dd-elm-2-6-emoji64", "dd-var-emoji64", "dd-llamagen-text-emoji64"):
        config = PRESETS[name]()
        teacher = PRESETS[config.model.teacher]()
        with torch.device("meta"):
            student = Distilled(config.model)
        assert student.spec.describe() == type(student.net)(teacher.model).spec.describe()
        codes = getattr(PRESETS[teacher.tokenizer]().model, "dim", config.model.code_dim)
        assert codes == config.model.code_dim


def test_the_bench_sets_a_student_beside_its_teacher(tmp_path, line, monkeypatch):
    """The table's rows, their calls, and marginals that are the teacher's while the joint is not."""
    from eval import bench_distilled as bench

    monkeypatch.setenv("GENLAB_CACHE", str(tmp_path / "cache"))
    teacher = line("var")
    student = Distilled(student_run(tmp_path, teacher).model)
    student.inherit(teacher, from_pretrained(tmp_path / "tokenizer"))
    student.extra |= teacher.extra
    student.save_pretrained(tmp_path / "student")
    c = bench.DistilledBenchConfig(model=str(tmp_path / "student"), n=0, rounds=1, classes="even", out=tmp_path / "out")
    result = bench.run(c)
    calls = {name: row["calls"] for name, row in result["rows"].items()}
    assert calls["teacher"] == calls["teacher by the map"] == 3
    assert (calls["1 step"], calls["2 steps"], calls["factorised"]) == (1, 2, 1)
    assert result["rows"]["1 step"]["fewer_calls"] == 3
    assert (tmp_path / "out" / "table.txt").read_text().count("\n") == len(calls) + 4
    with pytest.raises(ValueError, match="not a student"):
        bench.run(dataclasses.replace(c, model=str(tmp_path / "teacher")))
    values = torch.arange(60)[:, None] + torch.zeros(1, 21).long()  # all places of an image hold one number
    group = torch.arange(60) % 2
    shuffled = bench.factorised(values, group)
    assert torch.equal(shuffled.sort(0).values, values)
    assert bool((shuffled % 2 == group[:, None]).all())
    assert int((shuffled == shuffled[:, :1]).all(1).sum()) == 0


def test_each_student_has_its_own_teacher(pair, tmp_path):
    """One sampler draws from two students in turn."""
    name = "llamagen"
    teacher, student, _ = pair(name)
    others = []
    for i in range(2):
        teacher_i = randomise(CLASSES[NETS[name].kind](NETS[name]), 2.0, seed=i)
        folder = str(tmp_path / f"teacher{i}")
        teacher_i.save_pretrained(folder)
        config = dataclasses.replace(student.config, teacher=folder)
        others.append(Distilled(config).eval())
        others[-1].load_state_dict(student.state_dict())
    one, drawn = sampler(teacher_groups=teacher.n_groups), []
    for each in (*others, others[0]):
        drawn.append(one.sample(each, condition(name), torch.arange(B)).tokens.values)
        fresh = sampler(teacher_groups=teacher.n_groups).sample(each, condition(name), torch.arange(B)).tokens.values
        assert torch.equal(drawn[-1], fresh)
    assert not torch.equal(drawn[0], drawn[1])
