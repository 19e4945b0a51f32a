use pyo3::prelude::*;

#[pyfunction]
fn answer() -> u32 {
    42
}

#[pyfunction]
fn machine() -> &'static str {
    std::env::consts::ARCH
}

#[pymodule]
fn tiny_rust(_python: Python<'_>, module: &PyModule) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(answer, module)?)?;
    module.add_function(wrap_pyfunction!(machine, module)?)
}
