import subprocess
import sys

import tessy_hf


def test_importing_the_package_needs_neither_torch_nor_vllm_nor_datasets():
    code = "import sys, tessy_hf; print(sorted({'torch', 'vllm', 'datasets', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in tessy_hf.__all__:
        assert getattr(tessy_hf, name) is not None
    assert set(tessy_hf.__all__) <= set(dir(tessy_hf))


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(tessy_hf, "TessyTransfrom")


def test_the_core_imports_on_windows():
    code = "import sys; sys.modules['resource'] = None; from tessy_hf import TessyTransform, demo"
    subprocess.run([sys.executable, "-c", code], check=True)
