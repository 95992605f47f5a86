//! Reloads that change which workers there are, and policies.

use super::*;

#[test]
fn an_added_port_disturbs_nobody() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    let shown = world.apply(1, [ports("a", &[9004, 9002, 9003])]);
    assert_eq!(shown, ["publish web", "answer 1", "spawn 3 a on 9004"]);
    let expected = [(2, Some(9004), Some(3)), (0, Some(9002), Some(1)), (1, Some(9003), Some(2))];
    assert_eq!(world.slots(), expected, "numbers stay with their ports");
    world.up(3);
    assert_eq!(world.rotation(), [3, 1, 2], "rotation is in the order of the configuration");
}

#[test]
fn a_removed_port_drains_and_the_others_keep_their_numbers() {
    let mut world = World::healthy(ports("a", &[9002, 9003, 9004]));
    let shown = world.apply(1, [ports("a", &[9004, 9003])]);
    assert_eq!(shown, ["publish web", "retire 1", "answer 1"]);
    assert_eq!(world.slots(), [(2, Some(9004), Some(3)), (1, Some(9003), Some(2))]);
    assert_eq!(world.rotation(), [3, 2]);
    assert!(matches!(world.phase(1), Some(Phase::Draining { .. })));
}

#[test]
fn a_reload_that_changes_nothing_does_nothing() {
    let mut world = World::healthy(ports("a", &[9002]));
    assert_eq!(world.apply(1, [ports("a", &[9002])]), ["answer 1"]);
    world.end(1);
    let due = world.supervisor.deadline();
    assert_eq!(world.apply(2, [ports("a", &[9002])]), ["answer 2"]);
    assert_eq!(world.supervisor.deadline(), due, "a backoff goes on, too");
}

#[test]
fn a_worker_that_drains_since_it_was_removed_resumes_when_it_is_back() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [ports("a", &[9003])]);
    world.wait(SEC(20));
    let shown = world.apply(2, [ports("a", &[9002, 9003])]);
    assert_eq!(shown, ["reinstate 1", "publish web", "answer 2"]);
    assert_eq!(world.slots(), [(0, Some(9002), Some(1)), (1, Some(9003), Some(2))]);
    assert_eq!(world.rotation(), [1, 2]);
    assert_eq!(world.idle(1), [""; 0]);
    assert!(!world.wait(SEC(60)).contains(&"SIGTERM 1".to_owned()));
}

#[test]
fn a_number_is_kept_for_a_worker_that_may_come_back() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [ports("a", &[9010])]);
    world.up(3);
    assert_eq!(world.slots(), [(2, Some(9010), Some(3))]);
    let shown = world.apply(2, [ports("a", &[9010, 9003, 9002])]);
    assert_eq!(shown, ["reinstate 2", "reinstate 1", "publish web", "answer 2"]);
    let expected = [(2, Some(9010), Some(3)), (1, Some(9003), Some(2)), (0, Some(9002), Some(1))];
    assert_eq!(world.slots(), expected);
}

#[test]
fn a_number_is_free_when_nobody_has_it() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [ports("a", &[9003])]);
    world.idle(1);
    world.end(1);
    world.apply(2, [ports("a", &[9003, 9004])]);
    assert_eq!(world.slots(), [(1, Some(9003), Some(2)), (0, Some(9004), Some(3))]);
}

#[test]
fn workers_on_other_ports_are_proven_before_the_old_ones_go() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    let shown = world.apply(1, [ports("a", &[9003, 9010])]);
    assert_eq!(shown, ["publish web", "spawn 3 a on 9010"], "they need not wait for each other");
    assert_eq!(world.rotation(), [2, 1]);
    assert_eq!(world.up(3), ["publish web", "retire 1", "answer 1"]);
    assert_eq!(world.rotation(), [2, 3]);
    assert_eq!(world.slots(), [(1, Some(9003), Some(2)), (2, Some(9010), Some(3))]);
}

#[test]
fn workers_whose_successors_on_other_ports_fail_stay() {
    for command in ["a", "b"] {
        let mut world = World::healthy(ports("a", &[9002, 9003]));
        world.apply(1, [ports(command, &[9010])]);
        world.started(3);
        let error = "web: slot 2: exit status 1; the 2 old workers still serve, nothing changed";
        assert_eq!(world.exit(3), ["publish web", &format!("answer 1: {error}"), "restored web"]);
        assert_eq!(world.web().config, ports("a", &[9002, 9003]));
        assert_eq!(world.rotation(), [1, 2]);
        assert_eq!(world.gone(3), [""; 0]);
        assert_eq!(world.slots(), [(0, Some(9002), Some(1)), (1, Some(9003), Some(2))]);
        assert_eq!(world.end(1), ["publish web"], "and is restarted like any other");
        assert_eq!(world.wait(MS(100))[..2], ["publish web", "spawn 4 a on 9002"]);
    }
}

#[test]
fn a_slot_that_is_too_many_stays_until_the_new_settings_are_proven() {
    let mut world = World::healthy(count("a", 2));
    assert_eq!(world.apply(1, [count("b", 1)]), ["publish web", "spawn 3 b on any"]);
    assert_eq!(world.rotation(), [1, 2]);
    assert_eq!(world.up(3), ["publish web", "retire 1", "retire 2", "answer 1"]);
    assert_eq!(world.rotation(), [3]);
}

#[test]
fn a_worker_that_is_to_go_and_ends_before_is_not_started_again() {
    let mut world = World::healthy(ports("a", &[9002]));
    world.apply(1, [ports("a", &[9010])]);
    assert_eq!(world.end(1), ["publish web"]);
    assert_eq!(world.wait(SEC(1)), [""; 0]);
    assert_eq!(world.up(2), ["publish web", "answer 1"]);
}

#[test]
fn a_worker_that_was_unhealthy_has_still_to_prove_itself_when_it_is_back() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.fall(1);
    world.apply(1, [ports("a", &[9003])]);
    world.apply(2, [ports("a", &[9002, 9003])]);
    assert_eq!((world.phase(1), world.rotation()), (Some(Phase::Unhealthy), vec![2]));
    assert_eq!(world.pass(1), ["publish web"]);
}

#[test]
fn a_worker_on_a_fixed_port_does_not_resume_where_any_port_will_do() {
    let mut world = World::healthy(ports("a", &[9002]));
    world.apply(1, [service("api", "b", Slots::Ports(vec![9002]))]);
    world.closed();
    let api = service("api", "b", Slots::Ports(vec![9002]));
    let shown = world.apply(2, [count("a", 1), api]);
    assert_eq!(shown, ["publish web", "answer 2", "spawn 2 a on any"]);
    world.idle(1);
    assert!(world.end(1).contains(&"spawn 3 b on 9002".to_owned()));
}

#[test]
fn a_worker_that_would_be_started_differently_does_not_resume() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [ports("a", &[9003])]);
    let shown = world.apply(2, [stop_first(ports("b", &[9002, 9003]))]);
    assert_eq!(shown, ["publish web", "retire 2"], "slot 1 is replaced; slot 0 waits for its port");
    world.idle(1);
    assert_eq!(world.end(1), ["publish web", "spawn 3 b on 9002"]);
}

#[test]
fn a_worker_that_was_asked_to_end_does_not_resume() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [ports("a", &[9003])]);
    world.idle(1);
    assert_eq!(world.apply(2, [ports("a", &[9002, 9003])]), ["publish web", "answer 2"]);
    assert!(matches!(world.coming(), Coming::At(_)));
    assert_eq!(world.end(1), ["publish web", "spawn 3 a on 9002"]);
}

#[test]
fn a_service_that_is_back_before_its_listeners_were_empty_lost_nothing() {
    let api = service("api", "b", Slots::Ports(vec![9100]));
    let mut world = World::healthy(ports("a", &[9002]));
    world.apply(1, [api.clone()]);
    assert_eq!(world.rotation(), [1]);
    assert_eq!(world.apply(2, [ports("a", &[9002]), api]), ["answer 2"]);
    assert_eq!(world.closed(), [""; 0]);
    assert_eq!((world.phase(1), world.rotation()), (Some(Phase::Healthy), vec![1]));
}

#[test]
fn a_service_that_is_back_later_resumes_its_workers() {
    let api = service("api", "b", Slots::Ports(vec![9100]));
    let web = || stop_first(ports("a", &[9003, 9002]));
    let mut world = World::healthy(web());
    world.restart(1, None);
    let shown = world.apply(2, [api.clone()]);
    assert_eq!(
        shown,
        [
            "publish web",
            "publish api",
            "answer 1: the service was removed",
            "close web",
            "answer 2",
            "spawn 3 b on 9100"
        ]
    );
    assert_eq!(world.closed(), ["publish web", "retire 2"]);
    assert_eq!(world.restart(3, Some("web")), [r#"answer 3: there is no service "web""#]);
    let shown = world.apply(4, [web(), api]);
    assert_eq!(shown, ["reinstate 2", "publish web", "answer 4"]);
    assert_eq!(world.slots(), [(0, Some(9003), None), (1, Some(9002), Some(2))]);
    assert!(matches!(world.phase(1), Some(Phase::Draining { .. })), "replaced is not removed");
    world.idle(1);
    assert_eq!(world.end(1), ["publish web", "spawn 4 a on 9003"]);
}

#[test]
fn a_removed_service_is_forgotten_when_its_last_worker_is_gone() {
    let mut world = World::healthy(ports("a", &[9002]));
    world.apply(1, [service("api", "b", Slots::Ports(vec![9100]))]);
    assert_eq!(world.closed(), ["publish web", "retire 1"]);
    world.idle(1);
    assert_eq!(world.end(1), ["forget web"]);
    assert_eq!(world.supervisor.services().count(), 1);
}

#[test]
fn a_new_policy_holds_at_once_and_restarts_nobody() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    let mut config = stop_first(ports("a", &[9002, 9003]));
    config.health.fall = NonZeroU32::MIN;
    config.restart.unhealthy_after = SEC(1);
    config.stop.timeout = SEC(2);
    config.routing.hold_timeout = SEC(3);
    assert_eq!(world.apply(1, [config]), ["publish web", "answer 1"]);
    assert_eq!(world.fail(1), ["publish web"]);
    assert_eq!(world.wait(SEC(1))[..3], ["publish web", "probe 1", "retire 1"]);
    assert_eq!(world.idle(1), ["SIGTERM 1"]);
    assert_eq!(world.wait(SEC(2)).last().map(|s| &**s), Some("kill 1"));
    assert_eq!(world.spawns.len(), 2);
}
