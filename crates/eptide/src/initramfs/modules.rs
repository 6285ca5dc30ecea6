//! Kernel modules of an unpacked kernel package and the order in which to load them.
//!
//! Packages come without `modules.dep` (it is made on installation), so dependencies are read from
//! the modules themselves: the `.modinfo` section holds `depends=a,b`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The modules of one kernel, by name.
#[derive(Debug, Default)]
pub(crate) struct Modules {
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

/// A module and what it is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// File name.
    pub(crate) file: String,
    /// The file's content.
    pub(crate) content: Vec<u8>,
}

impl Modules {
    /// Finds all modules below `folder`.
    pub(crate) fn find(folder: &Path) -> io::Result<Self> {
        let mut modules = Self::default();
        modules.visit(folder)?;
        Ok(modules)
    }

    /// Whether the kernel has a module of this name, as a file or built in.
    pub(crate) fn has(&self, name: &str) -> bool {
        let name = canonical(name);
        self.files.contains_key(&name) || self.built_in.contains(&name)
    }

    /// The name of a module's file.
    pub(crate) fn file_name(&self, name: &str) -> Option<&str> {
        self.files.get(&canonical(name))?.file_name()?.to_str()
    }

    fn visit(&mut self, folder: &Path) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                self.visit(&path)?;
            } else if entry.file_name() == "modules.builtin" {
                let list = fs::read_to_string(&path)?;
                let names = list.lines().filter_map(|line| {
                    let file = line.rsplit('/').next()?;
                    Some(canonical(file.split_once(".ko")?.0))
                });
                self.built_in.extend(names);
            } else if let Some((stem, "" | ".xz" | ".zst")) =
                entry.file_name().to_string_lossy().split_once(".ko")
            {
                self.files.insert(canonical(stem), path);
            }
        }
        Ok(())
    }

    /// The modules named and all they depend on, each after its dependencies. Names that this
    /// kernel does not have (because it has them built in) are left out.
    pub(crate) fn load_order<'n>(
        &self,
        names: impl IntoIterator<Item = &'n str>,
    ) -> io::Result<Vec<Module>> {
        let mut order = Order {
            modules: self,
            taken: Vec::new(),
            loaded: Vec::new(),
        };
        for name in names {
            order.take(&canonical(name))?;
        }
        Ok(order.loaded)
    }
}

/// A load order being built.
struct Order<'a> {
    modules: &'a Modules,
    taken: Vec<String>,
    loaded: Vec<Module>,
}

impl Order<'_> {
    fn take(&mut self, name: &str) -> io::Result<()> {
        let Some(path) = self.modules.files.get(name) else {
            return Ok(());
        };
        if self.taken.iter().any(|taken| taken == name) {
            return Ok(());
        }
        self.taken.push(name.into());
        let content = fs::read(path)?;
        for dependency in dependencies(&content) {
            self.take(&dependency)?;
        }
        let file = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        self.loaded.push(Module { file, content });
        Ok(())
    }
}

/// The kernel treats `-` and `_` in module names alike.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// What a module's `.modinfo` says it needs. A compressed module says nothing here.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value
        .split(',')
        .filter(|name| !name.is_empty())
        .map(canonical)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    fn kernel() -> TempDir {
        let folder = TempDir::new().unwrap();
        let module = |name: &str, depends: &str| {
            let path = folder.as_path().join(format!("kernel/drivers/{name}.ko"));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(
                path,
                format!("ELF\0license=GPL\0depends={depends}\0name={name}\0"),
            )
            .unwrap();
        };
        module("virtio", "");
        module("virtio_ring", "virtio");
        module("virtio-rng", "virtio,virtio_ring");
        let built_in = "kernel/fs/binfmt-script.ko\nkernel/lib/crc32.ko\n";
        fs::write(folder.as_path().join("modules.builtin"), built_in).unwrap();
        folder
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let folder = kernel();
        let modules = Modules::find(folder.as_path()).unwrap();
        let order = modules
            .load_order(["virtio_rng", "built_in", "virtio_ring"])
            .unwrap();
        let files: Vec<&str> = order.iter().map(|module| module.file.as_str()).collect();
        assert_eq!(files, ["virtio.ko", "virtio_ring.ko", "virtio-rng.ko"]);
    }

    #[test]
    fn what_a_kernel_has_is_known() {
        let folder = kernel();
        let modules = Modules::find(folder.as_path()).unwrap();
        for name in ["virtio-rng", "virtio_ring", "binfmt_script", "crc32"] {
            assert!(modules.has(name), "{name}");
        }
        assert!(!modules.has("xfs"));
        assert_eq!(modules.file_name("virtio_rng"), Some("virtio-rng.ko"));
        assert_eq!(modules.file_name("crc32"), None);
    }

    #[test]
    fn a_module_without_information_needs_nothing() {
        assert!(dependencies(b"\xfd7zXZ").is_empty());
        assert!(dependencies(b"\0depends=\0").is_empty());
    }
}
