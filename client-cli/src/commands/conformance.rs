//! `conformance`: recorded call sequences against a module.

use std::io::BufRead as _;
use std::path::{Path, PathBuf};

use crate::args::ConformanceArgs;
use crate::conformance::{Player, Report, Sequence};
use crate::error::Error;
use crate::output::Answer;
use crate::progress::Progress;
use crate::session::Session;
use crate::trace;

/// `mmuctl conformance`.
pub(super) async fn run(session: &Session, args: &ConformanceArgs) -> Result<Answer, Error> {
    let files = args.files.clone();
    let reading = tokio::task::spawn_blocking(move || read(&files));
    let sequences = tokio::select! {
        read = reading => read.map_err(|error| Error::Runtime(std::io::Error::other(error)))??,
        () = session.stop.asked() => return Err(Error::Interrupted),
    };
    let channel = session.module_channel().await?;
    let mut player = Player::new(channel, session.limits, session.stop.clone());
    let progress = Progress::new("sequences", sequences.len() as u64);
    let mut report = Report::default();
    for sequence in &sequences {
        let (steps, outcome) = player.play(sequence).await?;
        report.add(steps, outcome);
        progress.advance(1);
    }
    drop(progress);
    let verdict = (report.failed > 0).then_some(Error::Conformance {
        failed: report.failed,
        sequences: report.sequences,
    });
    Ok(Answer {
        verdict,
        ..Answer::new(report.to_json(), report.text())
    })
}

fn read(files: &[PathBuf]) -> Result<Vec<Sequence>, Error> {
    let mut sequences = Vec::new();
    for path in files {
        read_file(path, &mut sequences)?;
    }
    Ok(sequences)
}

fn read_file(path: &Path, into: &mut Vec<Sequence>) -> Result<(), Error> {
    for (at, line) in trace::open(path)?.lines().enumerate() {
        let line = line.map_err(|source| Error::File {
            path: path.to_owned(),
            source,
        })?;
        if line.trim().is_empty() {
            continue;
        }
        let sequence = Sequence::parse(&line).map_err(|source| Error::Sequence {
            path: path.to_owned(),
            line: at + 1,
            source,
        })?;
        into.push(sequence);
    }
    Ok(())
}
