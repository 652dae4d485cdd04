//! A value made of files, made anew when they change.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::TlsError;
use crate::error_chain;

/// What tells one version of a file from another: device, inode, size, and the times of the last
/// changes in nanoseconds. `None` when there is no such file.
type Stamp = Option<(u64, u64, u64, i128, i128)>;

/// The value, and what it was made of.
pub(super) struct Watched<T> {
    files: Vec<PathBuf>,
    make: Box<dyn Fn() -> Result<T, TlsError> + Send + Sync>,
    now: ArcSwap<T>,
    looked: Mutex<Looked>,
    /// Time between two looks at the files.
    every: Duration,
}

struct Looked {
    at: Instant,
    stamps: Vec<Stamp>,
}

impl<T> Watched<T> {
    /// Makes the value for the first time. The files are looked at no more often than `every`.
    pub(super) fn new(
        files: Vec<PathBuf>,
        every: Duration,
        make: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        // Before they are read: a change in between is then seen by the next look.
        let stamps = stamps(&files);
        let first = make()?;
        Ok(Self {
            files,
            make: Box::new(make),
            now: ArcSwap::from_pointee(first),
            looked: Mutex::new(Looked {
                at: Instant::now(),
                stamps,
            }),
            every,
        })
    }

    /// The value of the files as they are, or as they were when they could last be used (L1).
    pub(super) fn get(&self) -> Arc<T> {
        let mut looked = match self.looked.try_lock() {
            Ok(looked) => looked,
            Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
            // Somebody looks right now.
            Err(TryLockError::WouldBlock) => return self.now.load_full(),
        };
        if looked.at.elapsed() < self.every {
            return self.now.load_full();
        }
        looked.at = Instant::now();
        let stamps = stamps(&self.files);
        if stamps != looked.stamps {
            looked.stamps = stamps;
            let files = self.files.iter().map(|file| file.display().to_string());
            let files = files.collect::<Vec<_>>().join(", ");
            match (self.make)() {
                Ok(value) => {
                    self.now.store(Arc::new(value));
                    tracing::info!(files, "new certificates are in use");
                }
                Err(error) => tracing::warn!(
                    error = error_chain(&error),
                    files,
                    "changed certificates cannot be used, the old ones stay in use"
                ),
            }
        }
        self.now.load_full()
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    let nanoseconds = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
    files
        .iter()
        .map(|file| {
            let file = fs::metadata(file).ok()?;
            let modified = nanoseconds(file.mtime(), file.mtime_nsec());
            let changed = nanoseconds(file.ctime(), file.ctime_nsec());
            Some((file.dev(), file.ino(), file.size(), modified, changed))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number in a file; anything else is an error.
    fn watch(file: PathBuf, every: Duration) -> Watched<u32> {
        Watched::new(vec![file.clone()], every, move || {
            let text = fs::read_to_string(&file).unwrap_or_default();
            text.parse().map_err(|_| TlsError::NotPem {
                path: file.clone(),
                wanted: "number",
            })
        })
        .unwrap()
    }

    #[test]
    fn a_change_is_taken_over_and_a_broken_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("number");
        fs::write(&file, "1").unwrap();
        let watched = watch(file.clone(), Duration::ZERO);
        for (content, value) in [
            (Some("2"), 2),
            (Some("3"), 3),
            (Some("three"), 3),
            (None, 3),
            (Some("40"), 40),
        ] {
            // As the tools that manage certificates do: a new file takes the old one's name.
            let _ = fs::remove_file(&file);
            if let Some(content) = content {
                let new = dir.path().join("new");
                fs::write(&new, content).unwrap();
                fs::rename(&new, &file).unwrap();
            }
            assert_eq!(*watched.get(), value, "{content:?}");
            assert_eq!(*watched.get(), value, "{content:?} again");
        }
    }

    #[test]
    fn files_are_not_looked_at_more_often_than_said() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("number");
        fs::write(&file, "1").unwrap();
        let watched = watch(file.clone(), Duration::from_secs(3600));
        fs::write(&file, "22").unwrap();
        assert_eq!(*watched.get(), 1);
    }
}
