//! Hands the stage files to maturin (pyproject.toml, `include`), which puts them into the wheel
//! as `hnlm_ref/stages/`: an installed `hnlm-ref` runs the same files a reader reads.
use std::{env, fs, path::Path};

fn main() {
    println!("cargo::rerun-if-changed=stages");
    let to = Path::new(&env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("stages");
    let _ = fs::remove_dir_all(&to);
    fs::create_dir_all(&to).expect("OUT_DIR is writable");
    for entry in fs::read_dir("stages").expect("stages/ stands beside Cargo.toml").flatten() {
        if entry.path().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).expect("a stage file can be copied");
        }
    }
}
