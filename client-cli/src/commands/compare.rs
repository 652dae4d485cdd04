//! `compare`: a recording of a real KVM against the model.

use std::path::{Path, PathBuf};

use crate::args::CompareArgs;
use crate::client::Client;
use crate::compare::{Player, Recording, Report};
use crate::error::Error;
use crate::output::Answer;
use crate::progress::Progress;
use crate::trace;

/// `mmuctl compare`.
pub(super) async fn run(client: &Client, args: &CompareArgs) -> Result<Answer, Error> {
    let mut report = Report::default();
    let mut player = Player::new(client.clone());
    for path in &args.files {
        let recording = read(client, path.clone()).await?;
        let file = path.display().to_string();
        let progress = Progress::new("steps", recording.steps.len() as u64);
        let tell = |step: &_, verdict| {
            report.add(&file, step, verdict);
            progress.advance(1);
        };
        player.play(&recording, tell).await?;
    }
    let verdict = (report.different > 0).then_some(Error::Compare {
        different: report.different,
        steps: report.steps,
    });
    Ok(Answer {
        verdict,
        ..Answer::new(report.to_json(), report.text())
    })
}

async fn read(client: &Client, path: PathBuf) -> Result<Recording, Error> {
    let reading = tokio::task::spawn_blocking(move || read_file(&path));
    tokio::select! {
        read = reading => read.map_err(|error| Error::Runtime(std::io::Error::other(error)))?,
        () = client.stop().asked() => Err(Error::Interrupted),
    }
}

fn read_file(path: &Path) -> Result<Recording, Error> {
    let input = trace::open(path)?;
    Recording::read(input).map_err(|source| Error::Recording {
        path: path.to_owned(),
        source,
    })
}
