"""What importing the package costs, and what it offers."""

import subprocess
import sys


def test_the_package_offers_the_pipeline_and_imports_neither_torch_nor_onnx():
    code = (
        "import sys, flux2_trt; assert 'numpy' not in sys.modules; from flux2_trt import Flux2Pipeline; "
        "print(sorted({'torch', 'onnx', 'onnxscript', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr
