//! The replay window: a batch that is sent again gets its recorded answer.
//!
//! A session numbers its batches from 1. The module keeps the answers of the last numbers, so that
//! a caller that lost a reply sends the same number again and learns what the first one did. The
//! lock of a session is held while a batch runs: a number that is in work on another connection is
//! waited for, and then recalled.
//!
//! Invariants
//! - R1  A number runs at most once. What cannot be told apart from a number that ran is refused:
//!   numbers below the window, and any number but 1 in a session that is not known (forgotten, or
//!   of an earlier instance).
//! - R2  A session that somebody holds is not forgotten.
//! - R3  Of a session that was ended nothing runs any more, and no session of that name begins.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use mirror_proto::module::Chain;
use tdx_defs::SeamcallResult;
use tokio::sync::OwnedMutexGuard;

use crate::batch::Ticket;
use crate::status::Refusal;

/// One session: its window, locked while one of its batches runs (S3).
pub(crate) type Session = Arc<tokio::sync::Mutex<Window>>;

/// All sessions, the least recently used forgotten first.
#[derive(Debug)]
pub(crate) struct Sessions {
    // A standard mutex: held to look up and to insert, never across an await.
    table: Mutex<Table>,
    capacity: usize,
    window: u64,
    instance: String,
}

/// Prefixes of ended sessions that are remembered. A caller that is gone has sent all that it ever
/// will, so it is not for long that one is needed.
const MAX_ENDED: usize = 64;

#[derive(Debug, Default)]
struct Table {
    sessions: HashMap<String, Entry>,
    /// R3, oldest first.
    ended: VecDeque<String>,
    /// Counts look-ups; orders `Entry::used`.
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    session: Session,
    used: u64,
}

impl Sessions {
    /// Remembers up to `capacity` sessions with `window` answers each.
    pub(crate) fn new(capacity: usize, window: u32, instance: String) -> Self {
        Self {
            table: Mutex::default(),
            capacity,
            window: window.into(),
            instance,
        }
    }

    /// The session of a ticket; a new one for number 1.
    pub(crate) fn open(&self, ticket: &Ticket) -> Result<Session, Refusal> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.clock += 1;
        let used = table.clock;
        if let Some(entry) = table.sessions.get_mut(&ticket.session) {
            entry.used = used;
            return Ok(entry.session.clone());
        }
        if table.has_ended(&ticket.session) {
            return Err(Refusal::SessionEnded {
                session: ticket.session.clone(),
            });
        }
        if ticket.sequence != 1 {
            return Err(Refusal::UnknownSession {
                session: ticket.session.clone(),
                sequence: ticket.sequence,
                instance: self.instance.clone(),
            });
        }
        if table.sessions.len() >= self.capacity {
            table.forget_one().ok_or(Refusal::TooManySessions {
                limit: self.capacity,
            })?;
        }
        let session = Session::new(tokio::sync::Mutex::new(Window::new(self.window)));
        let entry = Entry {
            session: session.clone(),
            used,
        };
        table.sessions.insert(ticket.session.clone(), entry);
        Ok(session)
    }

    /// A new session that its caller holds until it is done: for something that is no batch.
    pub(crate) fn hold(&self, name: &str) -> Result<OwnedMutexGuard<Window>, Refusal> {
        let ticket = Ticket {
            session: name.to_owned(),
            sequence: 1,
            fingerprint: 0,
        };
        let mut window = self
            .open(&ticket)?
            .try_lock_owned()
            .map_err(|_| Refusal::SequenceReused { sequence: 1 })?;
        if window.recall(&ticket)?.is_some() {
            return Err(Refusal::SequenceReused { sequence: 1 });
        }
        // The name is used up.
        window.record(&ticket, Vec::new());
        Ok(window)
    }

    /// Ends every session whose name begins with `prefix`. When this returns, nothing of theirs is
    /// in work; how many there were.
    pub(crate) async fn end(&self, prefix: &str) -> usize {
        let found: Vec<Session> = {
            let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
            if !table.ended.iter().any(|ended| ended == prefix) {
                table.ended.push_back(prefix.to_owned());
                if table.ended.len() > MAX_ENDED {
                    table.ended.pop_front();
                }
            }
            let names = table
                .sessions
                .extract_if(|name, _| name.starts_with(prefix));
            names.map(|(_, entry)| entry.session).collect()
        };
        for session in &found {
            session.lock().await.has_ended = true;
        }
        found.len()
    }

    /// The run of the module that the sessions belong to.
    pub(crate) fn instance(&self) -> &str {
        &self.instance
    }
}

impl Table {
    /// R3.
    fn has_ended(&self, name: &str) -> bool {
        self.ended.iter().any(|prefix| name.starts_with(&**prefix))
    }

    /// Forgets the least recently used session that nobody holds.
    fn forget_one(&mut self) -> Option<()> {
        let (oldest, _) = self
            .sessions
            .iter()
            .filter(|(_, entry)| Arc::strong_count(&entry.session) == 1)
            .min_by_key(|(_, entry)| entry.used)?;
        let oldest = oldest.clone();
        self.sessions.remove(&oldest);
        Some(())
    }
}

/// The answers of one session's last numbers.
#[derive(Debug)]
pub(crate) struct Window {
    /// How many numbers it spans.
    size: u64,
    /// Highest number that ran.
    highest: u64,
    /// R3.
    has_ended: bool,
    /// The last link of a chain that ran, if it ran whole.
    chain: Option<Chain>,
    answers: BTreeMap<u64, Answer>,
}

#[derive(Debug)]
struct Answer {
    fingerprint: u64,
    results: Vec<SeamcallResult>,
}

impl Window {
    fn new(size: u64) -> Self {
        Self {
            size,
            highest: 0,
            has_ended: false,
            chain: None,
            answers: BTreeMap::new(),
        }
    }

    /// The lowest number that the window still knows about.
    fn lowest(&self) -> u64 {
        self.highest.saturating_sub(self.size) + 1
    }

    /// The recorded answer, or `None` for a number that has not run.
    pub(crate) fn recall(&self, ticket: &Ticket) -> Result<Option<&[SeamcallResult]>, Refusal> {
        let sequence = ticket.sequence;
        if self.has_ended {
            return Err(Refusal::SessionEnded {
                session: ticket.session.clone(),
            });
        }
        if sequence < self.lowest() {
            return Err(Refusal::BelowWindow {
                sequence,
                lowest: self.lowest(),
            });
        }
        match self.answers.get(&sequence) {
            None => Ok(None),
            Some(answer) if answer.fingerprint != ticket.fingerprint => {
                Err(Refusal::SequenceReused { sequence })
            }
            Some(answer) => Ok(Some(&answer.results)),
        }
    }

    /// Whether a batch at this place of a chain may run.
    pub(crate) fn goes_on(&self, chain: Option<Chain>) -> bool {
        chain.is_none_or(|Chain { id, link }| {
            let before = link.checked_sub(1).map(|link| Chain { id, link });
            before.is_none() || self.chain == before
        })
    }

    /// A link of a chain ran.
    pub(crate) fn link(&mut self, chain: Chain, whole: bool) {
        self.chain = whole.then_some(chain);
    }

    /// Keeps the answer of a batch that has run.
    pub(crate) fn record(&mut self, ticket: &Ticket, results: Vec<SeamcallResult>) {
        self.highest = self.highest.max(ticket.sequence);
        self.answers.insert(
            ticket.sequence,
            Answer {
                fingerprint: ticket.fingerprint,
                results,
            },
        );
        self.answers = self.answers.split_off(&self.lowest());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(session: &str, sequence: u64) -> Ticket {
        Ticket {
            session: session.into(),
            sequence,
            fingerprint: sequence,
        }
    }

    fn answer(rax: u64) -> Vec<SeamcallResult> {
        vec![SeamcallResult {
            rax,
            ..SeamcallResult::default()
        }]
    }

    #[test]
    fn a_window_recalls_its_last_numbers_and_refuses_those_below() {
        let mut window = Window::new(3);
        for sequence in [1, 2, 4, 6] {
            assert_eq!(window.recall(&ticket("s", sequence)), Ok(None));
            window.record(&ticket("s", sequence), answer(sequence));
        }
        for (sequence, expected) in [
            (
                3,
                Err(Refusal::BelowWindow {
                    sequence: 3,
                    lowest: 4,
                }),
            ),
            (4, Ok(Some(&answer(4)[..]))),
            (5, Ok(None)),
            (6, Ok(Some(&answer(6)[..]))),
            (7, Ok(None)),
            (u64::MAX, Ok(None)),
        ] {
            assert_eq!(
                window.recall(&ticket("s", sequence)),
                expected,
                "{sequence}"
            );
        }
    }

    #[test]
    fn a_link_goes_on_behind_the_link_before_it_and_nothing_else() {
        let at = |id, link| Chain { id, link };
        let mut window = Window::new(3);
        assert!(window.goes_on(None) && window.goes_on(Some(at(7, 0))));
        assert!(!window.goes_on(Some(at(7, 1))), "nothing ran");
        window.link(at(7, 0), true);
        for (chain, expected) in [
            (at(7, 0), true),
            (at(7, 1), true),
            (at(7, 2), false),
            (at(8, 1), false),
            (at(8, 0), true),
        ] {
            assert_eq!(window.goes_on(Some(chain)), expected, "{chain:?}");
        }
        window.link(at(7, 1), false);
        for link in [1, 2] {
            assert!(!window.goes_on(Some(at(7, link))), "{link} of a broken one");
        }
        window.link(at(7, 0), true);
        window.link(at(8, 0), true);
        assert!(!window.goes_on(Some(at(7, 1))), "another came between");
    }

    #[test]
    fn the_highest_number_of_all_is_a_number_too() {
        let mut window = Window::new(2);
        window.record(&ticket("s", u64::MAX), answer(0));
        assert!(window.recall(&ticket("s", u64::MAX)).unwrap().is_some());
        assert!(window.recall(&ticket("s", u64::MAX - 2)).is_err());
    }

    #[test]
    fn a_number_with_other_content_is_refused() {
        let mut window = Window::new(3);
        window.record(&ticket("s", 1), answer(1));
        let other = Ticket {
            fingerprint: 99,
            ..ticket("s", 1)
        };
        assert_eq!(
            window.recall(&other),
            Err(Refusal::SequenceReused { sequence: 1 })
        );
    }

    #[tokio::test]
    async fn an_ended_session_is_waited_for_and_runs_nothing_more() {
        let sessions = Arc::new(Sessions::new(8, 4, "instance".into()));
        let (mine, others) = (ticket("gone-s0", 1), ticket("here-s0", 1));
        let session = sessions.open(&mine).unwrap();
        let window = session.clone().lock_owned().await;
        let inside = sessions.hold("gone-g0").unwrap();
        assert!(sessions.hold("gone-g0").is_err(), "one at a time");
        let ending = {
            let sessions = Arc::clone(&sessions);
            async move { sessions.end("gone-").await }
        };
        let mut ending = by_hand(ending);
        assert!(!ending.poll(), "a batch is in work, a vCPU is inside");
        drop(window);
        assert!(!ending.poll());
        drop(inside);
        while !ending.poll() {}
        // Whoever kept it, and whoever comes late.
        let refusal = session
            .lock()
            .await
            .recall(&ticket("gone-s0", 2))
            .unwrap_err();
        assert!(matches!(refusal, Refusal::SessionEnded { .. }), "{refusal}");
        for late in ["gone-s0", "gone-s1", "gone-g1"] {
            assert!(sessions.open(&ticket(late, 1)).is_err(), "{late}");
            assert!(sessions.hold(late).is_err(), "{late}");
        }
        assert!(sessions.open(&others).is_ok());
    }

    /// A future that is polled by hand.
    struct Polled<T>(std::pin::Pin<Box<dyn Future<Output = T>>>, bool);

    fn by_hand<T: 'static>(future: impl Future<Output = T> + 'static) -> Polled<T> {
        Polled(Box::pin(future), false)
    }

    impl<T> Polled<T> {
        /// Whether it is done.
        fn poll(&mut self) -> bool {
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            self.1 = self.1 || self.0.as_mut().poll(&mut context).is_ready();
            self.1
        }
    }

    #[test]
    fn a_session_begins_at_one() {
        let sessions = Sessions::new(2, 4, "instance".into());
        let refusal = sessions.open(&ticket("s", 2)).unwrap_err();
        assert!(matches!(
            refusal,
            Refusal::UnknownSession { sequence: 2, .. }
        ));
        let first = sessions.open(&ticket("s", 1)).unwrap();
        assert!(Arc::ptr_eq(
            &first,
            &sessions.open(&ticket("s", 2)).unwrap()
        ));
    }

    #[test]
    fn the_least_recently_used_session_that_nobody_holds_is_forgotten() {
        let sessions = Sessions::new(2, 4, "instance".into());
        let held = sessions.open(&ticket("held", 1)).unwrap();
        drop(sessions.open(&ticket("idle", 1)).unwrap());
        let third = sessions.open(&ticket("third", 1)).unwrap();
        assert!(sessions.open(&ticket("idle", 2)).is_err());
        assert!(Arc::ptr_eq(
            &held,
            &sessions.open(&ticket("held", 2)).unwrap()
        ));

        let refusal = sessions.open(&ticket("fourth", 1)).unwrap_err();
        assert_eq!(refusal, Refusal::TooManySessions { limit: 2 });
        drop(third);
        assert!(sessions.open(&ticket("fourth", 1)).is_ok());
    }
}
